"""Passwords of local users: Argon2id with the parameters of argon2-cffi, hashed and verified in threads."""

import asyncio
import secrets
import unicodedata

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from claude_hitl_template.errors import InvalidInput, RateLimited

MIN_CHARS, MAX_CHARS = 12, 1024
AT_ONCE = 2  # each takes 64 MiB and most of a CPU
WAITING = 50


class Passwords:
    """Hashes and verifies passwords, a few at a time.

    Args:
        hasher: Argon2's parameters; default: the library's.
    """

    def __init__(self, hasher: PasswordHasher | None = None) -> None:
        self._hasher = hasher or PasswordHasher()
        # Verified for names that have no password: the time of an answer does not say which names exist.
        self._decoy = self._hasher.hash(secrets.token_urlsafe())
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._waiting = 0

    async def hash(self, password: str) -> str:
        """The form in which a password is stored. Raises InvalidInput for one that is too short or too long."""
        check_length(password)
        async with self._slots:
            return await asyncio.to_thread(self._hasher.hash, _normal(password))

    async def verify(self, stored: str | None, password: str) -> bool:
        """Whether `password` is the stored one. Takes as long without a stored one.

        Raises RateLimited while too many others wait.
        """
        if self._waiting >= WAITING:
            raise RateLimited("too many people sign in at this moment", 5.0)
        self._waiting += 1
        try:
            async with self._slots:
                fits = await asyncio.to_thread(self._fits, stored or self._decoy, _normal(password))
        finally:
            self._waiting -= 1
        return fits and stored is not None

    def _fits(self, stored: str, password: str) -> bool:
        try:
            return self._hasher.verify(stored, password)
        except (VerificationError, InvalidHashError):
            return False


def check_length(password: str) -> None:
    """Raises InvalidInput for a password that is too short or too long to be set."""
    if not MIN_CHARS <= len(_normal(password)) <= MAX_CHARS:
        raise InvalidInput(f"must have {MIN_CHARS} to {MAX_CHARS} characters", "password")


def _normal(password: str) -> str:
    """The same characters, whichever way a keyboard composes them. A lone surrogate is not text and fits no password."""
    return unicodedata.normalize("NFKC", password).encode("utf-8", "replace").decode()
