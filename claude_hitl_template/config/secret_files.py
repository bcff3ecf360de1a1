"""Secrets in files of the data folder, readable by the service's user only; never in environments or arguments."""

import base64
import hashlib
import hmac
import os
import secrets
import stat
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pydantic import SecretStr

from claude_hitl_template.config.credentials import read_credentials
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError, InvalidInput, NotFound, Unavailable

if TYPE_CHECKING:
    from claude_hitl_template.domain.audit.signing import Signer

SIGNING_KEY = "signing"
MODEL_KEY = "model-key"
SENT_MODEL_KEY = "model-key-sent"
AUDIT_KEY = "audit-key"
PUSH_KEY = "push-key"
API_KEY = "api-key"
DATABASE_URL = "database-url"
RAY_TOKEN = "ray-token"  # noqa: S105  (the name of a file)
POSTGRES_PASSWORD = "postgres-password"  # noqa: S105
PANEL_SECRET = "panel-secret"  # noqa: S105  (the names of files)
PANEL_PASSWORD = "panel-password"  # noqa: S105
OIDC_SECRET = "oidc-client-secret"  # noqa: S105
SENT_OIDC_SECRET = "oidc-client-secret-sent"  # noqa: S105
SMTP_PASSWORD = "smtp-password"  # noqa: S105
SENT_SMTP_PASSWORD = "smtp-password-sent"  # noqa: S105
ADMIN, ADMIN_PASSWORD = (
    "admin",
    "admin-password",
)  # the user that the first start makes, and the file of its password
PANEL_PROOF = "x-hitl-panel-proof"  # the header of `panel_proof`


KEY_BEGINS = "hitl_"
KEY_CHARS = len(KEY_BEGINS) + 43  # 32 random bytes
PREFIX_CHARS = 6

# What may be sent to a service that runs, and the file of each; such a file outlives every restart.
SENT = {
    "ANTHROPIC_API_KEY": SENT_MODEL_KEY,
    "HITL_OIDC_CLIENT_SECRET": SENT_OIDC_SECRET,
    "HITL_SMTP_PASSWORD": SENT_SMTP_PASSWORD,
}
MAX_SECRET_CHARACTERS = 4096


@dataclass(frozen=True)
class Prepared:
    """Result of `prepare`: the first API key if it was created now; whether HITL_API_KEY replaced the previous one."""

    made_key: str | None = None
    replaced_key: bool = False


def prepare(settings: Settings) -> Prepared:
    """Makes the data folder and its secrets. Raises ConfigError."""
    make_data_folder(settings)
    read_credentials(settings.credentials)  # reports an unusable file at start, not in a session
    try:
        for folder in (settings.secrets_dir, settings.logs_dir):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _close(folder)
        for path in (
            *settings.secrets_dir.iterdir(),
            *settings.data_dir.glob(f"{settings.database_path.name}*"),
        ):
            _close(path)
        folder = settings.secrets_dir
        _keep(folder / SIGNING_KEY, secrets.token_hex(32))
        if settings.anthropic_api_key is not None:
            write_secret(folder / MODEL_KEY, settings.anthropic_api_key.get_secret_value())
        for name, secret in (
            (OIDC_SECRET, settings.oidc_client_secret),
            (SMTP_PASSWORD, settings.smtp_password),
        ):
            if secret is not None:
                write_secret(folder / name, secret.get_secret_value())
            else:
                (folder / name).unlink(missing_ok=True)
        _keep(folder / ADMIN_PASSWORD, secrets.token_urlsafe(16))
        _keep_database_url(settings)
        if settings.ray_token is not None:
            write_secret(folder / RAY_TOKEN, settings.ray_token.get_secret_value())
        else:
            _keep(folder / RAY_TOKEN, secrets.token_hex(32))
        if settings.api_key is not None:
            return Prepared(replaced_key=_replace_key(folder / API_KEY, settings.api_key.get_secret_value()))
        made = new_api_key()
        return Prepared(made_key=made if _keep(folder / API_KEY, made) else None)
    except OSError as error:
        raise _not_writable(settings, error) from error


def make_data_folder(settings: Settings) -> None:
    """Makes the data folder, and closes one that is there to other users. Raises ConfigError."""
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        _close(settings.data_dir)
    except OSError as error:
        raise _not_writable(settings, error) from error


def _close(path: Path) -> None:
    """Takes other users' permissions away, where the file is ours. The server of a local Postgres may pass through."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        return
    passes_only = stat.S_ISDIR(found.st_mode) and found.st_mode & 0o077 == 0o011
    if found.st_uid == os.geteuid() and found.st_mode & 0o077 and not passes_only:
        path.chmod(stat.S_IMODE(found.st_mode) & 0o700)


def forget_model_key(settings: Settings) -> bool:
    """Removes the key for the model, so that the offline model answers; False when there was none."""
    path = settings.secrets_dir / MODEL_KEY
    had = path.exists()
    path.unlink(missing_ok=True)
    return had


def prepare_panel(settings: Settings) -> None:
    """Makes the secrets of the panel that `hitl up` starts, after `prepare`. Raises ConfigError."""
    try:
        _keep(settings.secrets_dir / PANEL_SECRET, secrets.token_hex(32))
        _keep(settings.secrets_dir / PANEL_PASSWORD, secrets.token_urlsafe(16))
    except OSError as error:
        raise ConfigError(
            f"{settings.secrets_dir} cannot be written: {error.strerror}", "correct its permissions"
        ) from error


class SigningKey:
    """The key that signs tokens and capabilities. It cannot be pickled, so it stays in the processes that read it."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @property
    def secret(self) -> bytes:
        return self._secret

    def mac(self, purpose: bytes, claim: str) -> str:
        """HMAC-SHA256 in hexadecimal, with a separate key for each purpose."""
        return hmac.digest(hmac.digest(self._secret, purpose, "sha256"), claim.encode(), "sha256").hex()

    def __repr__(self) -> str:
        return "SigningKey(...)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("the signing key cannot be sent to another process")


def read_signing_key(settings: Settings) -> SigningKey:
    """Raises ConfigError."""
    return SigningKey(_read(settings.secrets_dir / SIGNING_KEY).encode())


def audit_signer(settings: Settings) -> "Signer":
    """Signs the audit log, with a key that is made at the first use. Raises ConfigError."""
    from claude_hitl_template.domain.audit.signing import Signer  # noqa: PLC0415 - only the ledger needs it

    path = settings.secrets_dir / AUDIT_KEY
    try:
        if not path.exists():
            _make_once(path, Signer.generate().pem())
        return Signer.of_pem(_read(path))
    except OSError as error:
        raise _not_writable(settings, error) from error
    except ValueError as error:
        raise ConfigError(
            f"{path} is not the key of the audit log",
            "restore it from a copy; without one move it away, and what was signed before needs its public key",
        ) from error


def push_key_pem(settings: Settings) -> str:
    """The private key with which the service shows push services who it is (VAPID), made at the first use. Browsers
    subscribed to its public half, so another key ends all subscriptions. Raises ConfigError."""
    path = settings.secrets_dir / PUSH_KEY
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            _make_once(path, _new_push_key())
        return _read(path)
    except OSError as error:
        raise _not_writable(settings, error) from error


def _new_push_key() -> str:
    # Every command reads secrets, and only the first start makes this key.
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def read_model_key(settings: Settings) -> SecretStr | None:
    """The key for Anthropic, first the one that was sent; None: the offline model answers. Raises ConfigError."""
    return _first(settings, SENT_MODEL_KEY, MODEL_KEY)


def read_oidc_secret(settings: Settings) -> SecretStr | None:
    """The client secret at the sign-in provider, first the one that was sent; None: there is none. Raises ConfigError."""
    return _first(settings, SENT_OIDC_SECRET, OIDC_SECRET)


def read_smtp_password(settings: Settings) -> SecretStr | None:
    """The password at the mail server, first the one that was sent; None: there is none. Raises ConfigError."""
    return _first(settings, SENT_SMTP_PASSWORD, SMTP_PASSWORD)


def _first(settings: Settings, *names: str) -> SecretStr | None:
    for name in names:
        path = settings.secrets_dir / name
        if path.exists():
            return SecretStr(_read(path))
    return None


def read_admin_password(settings: Settings) -> str | None:
    """The first password of the user `admin`, which the first start makes; None if its file was removed."""
    path = settings.secrets_dir / ADMIN_PASSWORD
    return _read(path) if path.exists() else None


class SecretFiles:
    """The secrets that were sent to the service, in files of `folder`. Every method raises NotFound for another name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        """The variables of those that are there."""
        return [name for name, file in SENT.items() if (self._folder / file).exists()]

    def put(self, name: str, value: str) -> None:
        """Raises InvalidInput for a malformed secret, and Unavailable if it cannot be written."""
        path = self.path(name)
        fits = value.isascii() and value.isprintable() and " " not in value
        if not fits or not 1 <= len(value) <= MAX_SECRET_CHARACTERS:
            raise InvalidInput("must be the bare secret: printable ASCII without spaces", "value")
        try:
            write_secret(path, value)
        except OSError as error:
            raise Unavailable(f"{name} cannot be kept: {error.strerror}") from error

    def remove(self, name: str) -> bool:
        """False when there was none."""
        path = self.path(name)
        had = path.exists()
        path.unlink(missing_ok=True)
        return had

    def keep_api_key(self, secret: str) -> None:
        """Keeps the first API key's new secret, for `./hitl` on this machine. Raises Unavailable."""
        try:
            write_secret(self._folder / API_KEY, secret)
        except OSError as error:
            raise Unavailable(
                f"the first key has another secret now, which cannot be kept ({error.strerror}): correct the "
                "permissions of the data folder, then ./hitl keys rotate once more"
            ) from error

    def path(self, name: str) -> Path:
        """The file of a secret, which need not be there."""
        if name not in SENT:
            raise NotFound(f"there is no secret {name!r}; there are: {', '.join(SENT)}")
        return self._folder / SENT[name]


def ray_token_file(settings: Settings) -> Path:
    """The file of the token that our Ray requires; it exists after `prepare`."""
    return settings.secrets_dir / RAY_TOKEN


def read_ray_token(settings: Settings) -> str | None:
    """The token for the Ray of these settings; None if unknown. Our own Ray's token is never sent to another one."""
    if settings.ray_token is not None:
        return settings.ray_token.get_secret_value()
    elsewhere = settings.dashboard_url or settings.ray_address
    path = ray_token_file(settings)
    return None if elsewhere or not path.exists() else _read(path)


def read_database_url(settings: Settings) -> SecretStr | None:
    """The URL of the Postgres database; None for SQLite. The service reads it from a file, not from its environment."""
    path = settings.secrets_dir / DATABASE_URL
    return settings.database_url or (SecretStr(_read(path)) if path.exists() else None)


def read_api_key(settings: Settings) -> str:
    """The first API key, for clients on this machine. Raises ConfigError."""
    return _read(settings.secrets_dir / API_KEY)


def operator_key(settings: Settings) -> str:
    """The key with which `./hitl` on this machine operates the service; no API key permits that. Raises ConfigError."""
    return hmac.new(read_signing_key(settings).secret, b"operator", "sha256").hexdigest()


def read_panel_login(settings: Settings) -> tuple[str, str] | None:
    """The panel's signing secret and its admin's password; None if `hitl up` never started a panel here."""
    if not (settings.secrets_dir / PANEL_SECRET).exists():
        return None
    return _read(settings.secrets_dir / PANEL_SECRET), _read(settings.secrets_dir / PANEL_PASSWORD)


def panel_proof(secret: str) -> str:
    """The service's proof to a panel with this secret, so that failed logins of others do not delay its own login."""
    return hmac.new(secret.encode(), b"claude-hitl", "sha256").hexdigest()


def new_api_key() -> str:
    """A new random secret."""
    return f"{KEY_BEGINS}{secrets.token_urlsafe(32)}"


def api_key_for(request: str, operator_key: str) -> str:
    """The same secret for the same request, so that it may be repeated. Derived from the operator's key."""
    made = hmac.new(operator_key.encode(), f"api key\n{request}".encode("utf-8", "surrogatepass"), "sha256")
    return f"{KEY_BEGINS}{base64.urlsafe_b64encode(made.digest()).decode().rstrip('=')}"


def public_prefix(secret: str) -> str:
    """The part of a generated key that is shown to recognise it; "" for a chosen secret, which may be short."""
    made_here = secret.startswith(KEY_BEGINS) and len(secret) >= KEY_CHARS
    return secret[: len(KEY_BEGINS) + PREFIX_CHARS] if made_here else ""


def hash_api_key(secret: str) -> str:
    """The stored form of an API key. Keys are long and random, so a plain SHA-256 is enough."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _not_writable(settings: Settings, error: OSError) -> ConfigError:
    return ConfigError(
        f"the data folder {settings.data_dir} cannot be written: {error.strerror}",
        "choose another with HITL_DATA_DIR, or correct its permissions",
    )


def _keep_database_url(settings: Settings) -> None:
    """Stores the URL in the settings. That of the local Postgres is in no setting; the code that starts it stores it."""
    path = settings.secrets_dir / DATABASE_URL
    if settings.database_url is not None:
        write_secret(path, settings.database_url.get_secret_value())
    elif not settings.postgres_dir.exists():
        path.unlink(missing_ok=True)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise ConfigError(
            f"{path.name} cannot be read: {error.strerror}", "start the service with ./hitl up"
        ) from error


def _replace_key(path: Path, key: str) -> bool:
    """Writes another key; False where it is the same, or the first."""
    before = path.read_text().strip() if path.exists() else None
    if before == key:
        return False
    write_secret(path, key)
    return before is not None


def _keep(path: Path, value: str) -> bool:
    """Writes unless it is there; True when it wrote."""
    if path.exists():
        return False
    write_secret(path, value)
    return True


def _make_once(path: Path, value: str) -> None:
    """Writes unless it is there, whole; of several processes that do so at once one does."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f"{path.name}.", delete=False) as file:
        file.write(value)
        file.flush()
        os.fsync(file.fileno())
    try:
        with suppress(FileExistsError):
            os.link(file.name, path)  # with the mode 0600 of a temporary file
    finally:
        os.unlink(file.name)


def write_secret(path: Path, value: str) -> None:
    temporary = path.with_suffix(".new")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(value)
    temporary.replace(path)
