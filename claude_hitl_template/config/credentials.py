"""Credentials that the owner adds to requests of a sandbox, outside of it: HITL_CREDENTIALS, a JSON file.

[{"host": "api.example.org", "path_prefix": "/v1/", "methods": ["GET"], "header": "Authorization",
  "value_file": "/etc/hitl/example-token"}]
"""

import stat
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import unquote

from pydantic import AfterValidator, Field, SecretStr, TypeAdapter, ValidationError, model_validator

from claude_hitl_template.domain.models import Frozen
from claude_hitl_template.domain.policy.web import check_entry, covers
from claude_hitl_template.errors import ConfigError

FIX = "correct the file that HITL_CREDENTIALS names; docs/security.md has an example"


def _one_host(entry: str) -> str:
    if entry.startswith("*"):
        raise ValueError("name one host, without `*`")
    return check_entry(entry)


def _prefix(path: str) -> str:
    if not path.startswith("/"):
        raise ValueError("it begins with `/`")
    return path


Method = Annotated[str, Field(pattern="^[A-Z]+$")]


class Credential(Frozen):
    """One header of the requests to one host. Without `methods`: of all. `plain_http`: of those without TLS, too."""

    host: Annotated[str, AfterValidator(_one_host)]
    path_prefix: Annotated[str, AfterValidator(_prefix)] = "/"
    methods: tuple[Method, ...] = ()
    header: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,100}$")] = "Authorization"
    plain_http: bool = False
    value: SecretStr | None = None
    value_file: Path | None = Field(default=None, exclude=True)

    @model_validator(mode="after")
    def _has_a_value(self) -> Self:
        if (self.value is None) == (self.value_file is None):
            raise ValueError("it has either a value or a value_file")
        return self

    def is_for(self, host: str, port: int) -> bool:
        return covers(self.host, host, port)

    def fits(self, method: str, target: str, *, tls: bool) -> bool:
        """Whether a request gets the credential. An ambiguous path gets none."""
        if not tls and not self.plain_http:
            return False
        path = unquote(target.partition("?")[0])
        is_clear = "\\" not in path and "//" not in path and not {".", ".."} & set(path.split("/"))
        return is_clear and path.startswith(self.path_prefix) and (not self.methods or method in self.methods)


def read_credentials(path: Path | None) -> tuple[Credential, ...]:
    """Raises ConfigError, which names the entry and the field, never a value. Blocking."""
    if path is None:
        return ()
    try:
        entries = TypeAdapter(tuple[Credential, ...]).validate_json(_private(path))
        return tuple(_with_value(entry) for entry in entries)
    except ValidationError as error:
        first = error.errors(include_input=False, include_context=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"HITL_CREDENTIALS is not usable: {where or path}: {first['msg']}", FIX) from None


def _with_value(entry: Credential) -> Credential:
    if entry.value_file is None:
        value = entry.value.get_secret_value() if entry.value else ""
    else:
        value = _private(entry.value_file).decode("utf-8", "replace").strip()
    if not value or not value.isascii() or not value.isprintable():
        raise ConfigError(
            f"HITL_CREDENTIALS is not usable: the value for {entry.host} must be printable ASCII, and not empty",
            FIX,
        )
    return entry.but(value=SecretStr(value), value_file=None)


def _private(path: Path) -> bytes:
    """The bytes of a file that its owner alone may read."""
    try:
        mode = path.stat().st_mode
        if stat.S_IMODE(mode) & 0o077:
            raise ConfigError(f"{path} may be read by others than its owner", f"chmod 600 {path}")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"HITL_CREDENTIALS: {path} cannot be read: {error.strerror}", FIX) from error
