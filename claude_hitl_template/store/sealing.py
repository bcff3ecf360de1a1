"""Encrypts the secrets of channels in the database, so that a backup of it has none in plain text."""

import base64
import json
import secrets
from collections.abc import Mapping
from typing import NoReturn

from cryptography.fernet import Fernet, InvalidToken

from claude_hitl_template.errors import ConfigError

SEALING = b"channel secrets"  # the purpose of the key


class Sealer:
    """Encrypts with a key of 32 bytes, given in hexadecimal. It cannot be pickled, so it stays in its process."""

    def __init__(self, key: str) -> None:
        self._fernet = Fernet(base64.urlsafe_b64encode(bytes.fromhex(key)))

    @classmethod
    def generate(cls) -> "Sealer":
        return cls(secrets.token_hex(32))

    def seal(self, secret: Mapping[str, str]) -> str:
        return self._fernet.encrypt(json.dumps(dict(secret)).encode()).decode()

    def open(self, sealed: str) -> dict[str, str]:
        """Raises ConfigError for what another key encrypted."""
        try:
            return json.loads(self._fernet.decrypt(sealed.encode()))
        except InvalidToken as error:
            raise ConfigError(
                "the channel's secret was encrypted with the key of another data folder",
                "set the channel's secret again",
            ) from error

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Sealer cannot be sent to another process")
