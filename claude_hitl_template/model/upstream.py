"""What the model endpoint relays to: a service that speaks Anthropic's Messages API."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from claude_hitl_template.config import logs

MESSAGES = "/v1/messages"
COUNT_TOKENS = "/v1/messages/count_tokens"

# Only these leave the service; everything else that a client sends stays here, above all its key.
SENT_ON = {
    "accept",
    "accept-encoding",
    "content-encoding",
    "content-length",
    "content-type",
    "user-agent",
    "x-app",
}
SENT_ON_PREFIXES = ("anthropic-", "x-claude-code-", "x-stainless-")
# Hop-by-hop headers (RFC 9110, 7.6.1), what the server sets itself, and cookies, which are the service's.
NOT_SENT_BACK = {
    "connection",
    "date",
    "keep-alive",
    "proxy-authenticate",
    "server",
    "set-cookie",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
# What cannot be reached, as an api_error: the CLI tries again as often as it may. After three of 529, or of an
# overloaded_error, in a row it gives up.
AWAY = 503
# https://docs.claude.com/en/api/errors
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


@dataclass(frozen=True)
class Call:
    """One POST of a client.

    `path` is MESSAGES or COUNT_TOKENS, `query` has no "?", names of headers are in lower case, and `body` can
    be read once.
    """

    path: str
    query: str
    headers: Mapping[str, str]
    body: AsyncIterator[bytes]


@dataclass(frozen=True)
class Answer:
    """What comes back. `chunks` can be read once; if it raises, the client's connection is broken off."""

    status: int
    headers: Mapping[str, str]
    chunks: AsyncIterator[bytes]


class Upstream(Protocol):
    """A service that speaks the Messages API."""

    def call(self, call: Call) -> AbstractAsyncContextManager[Answer]:
        """The answer to `call`, usable within the context; leaving or cancelling it ends the call at once.

        Failures of the service are answers in Anthropic's shape. Their text names no key.
        """
        ...


def problem(status: int, text: str, kind: str = "") -> dict[str, Any]:
    """A failure in Anthropic's shape; the `kind` of most statuses is known."""
    return {
        "type": "error",
        "error": {"type": kind or _ERROR_TYPES.get(status, "api_error"), "message": text},
        "request_id": logs.request_id() or None,
    }
