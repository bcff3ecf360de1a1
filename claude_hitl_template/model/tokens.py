"""Tokens with which a session's process identifies itself to the model endpoint, in place of an API key.

    hitl-session-<session id>.<lease epoch>.<HMAC-SHA256 of what precedes it, hex>

Nothing is stored: the secret is enough to check a token. The caller compares the epoch with the session's,
so that a stale owner is refused.
"""

import hashlib
import hmac
import re

from claude_hitl_template.errors import ConfigError, InvalidInput, Unauthorized

PREFIX = "hitl-session-"

_MIN_SECRET_BYTES = 16
_SESSION_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


def mint(secret: bytes, session_id: str, epoch: int) -> str:
    """The token of one owner of one session.

    Raises InvalidInput if the id or the epoch does not fit in, ConfigError if the secret is too short.
    """
    if not _SESSION_ID.fullmatch(session_id):
        raise InvalidInput("must be 1 to 128 of A-Z, a-z, 0-9, _ and -", "session_id")
    if epoch < 0:
        raise InvalidInput("must not be negative", "epoch")
    claim = f"{PREFIX}{session_id}.{epoch}"
    return f"{claim}.{_mac(secret, claim)}"


def check(secret: bytes, token: str) -> tuple[str, int]:
    """(session id, epoch) of a token minted with `secret`. Raises Unauthorized for anything else."""
    claim, _, mac = token.rpartition(".")
    # compare_digest refuses strings beyond ASCII.
    if not (token.isascii() and token.startswith(PREFIX) and hmac.compare_digest(_mac(secret, claim), mac)):
        raise Unauthorized("not a valid session token")
    session_id, _, epoch = claim.removeprefix(PREFIX).partition(".")
    return session_id, int(epoch)


def _mac(secret: bytes, claim: str) -> str:
    if len(secret) < _MIN_SECRET_BYTES:
        raise ConfigError(
            f"The secret for session tokens has {len(secret)} bytes; {_MIN_SECRET_BYTES} are the least.",
            "Set a longer one, for instance the output of `openssl rand -hex 32`.",
        )
    return hmac.new(secret, claim.encode(), hashlib.sha256).hexdigest()
