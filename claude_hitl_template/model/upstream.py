"""What the model endpoint relays to: a service that speaks Anthropic's Messages API."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol


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
