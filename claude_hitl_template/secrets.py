"""Secrets in files of the data folder, readable by the service's user only; never in environments or arguments."""

import hashlib
import hmac
from pathlib import Path

from pydantic import SecretStr

from claude_hitl_template.errors import ConfigError
from claude_hitl_template.settings import Settings

SIGNING_KEY = "signing"
MODEL_KEY = "model-key"
API_KEY = "api-key"


def read_signing_key(settings: Settings) -> bytes:
    """What session tokens are signed with. Raises ConfigError."""
    return _read(settings.secrets_dir / SIGNING_KEY).encode()


def read_model_key(settings: Settings) -> SecretStr | None:
    """The key for Anthropic; None: the offline model answers."""
    path = settings.secrets_dir / MODEL_KEY
    return SecretStr(_read(path)) if path.exists() else None


def read_api_key(settings: Settings) -> str:
    """The first API key, for clients on this machine. Raises ConfigError."""
    return _read(settings.secrets_dir / API_KEY)


def operator_key(settings: Settings) -> str:
    """What `./hitl` on this machine shows when it steers the service, which no API key may. Raises ConfigError."""
    return hmac.new(read_signing_key(settings), b"operator", "sha256").hexdigest()


def hash_api_key(secret: str) -> str:
    """What the store keeps of an API key. Keys are long and random, so a plain SHA-256 does."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise ConfigError(
            f"{path.name} cannot be read: {error.strerror}", "start the service with ./hitl up"
        ) from error
