"""The model's service of a chaos run: the offline model over HTTP, with the failures that the run requests."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager

from claude_hitl_template.model.endpoint import OfflineUpstream
from claude_hitl_template.model.offline import Scenarios
from claude_hitl_template.model.upstream import MESSAGES, Answer, Call

KEY = "the-run-has-a-model-of-its-own"
STATUSES = {
    "answers 429": (429, "rate_limit_error"),
    "answers 529": (529, "overloaded_error"),
    "answers 500": (500, "api_error"),
}
SILENT, CUT, MALFORMED = "is silent", "cuts its answer off", "answers with garbage"
ANSWERED = (
    3  # requests between two failures, so that not every request fails on a busy machine, which makes few
)
MISFORTUNES = (*STATUSES, SILENT, CUT, MALFORMED)


class UnluckyModel:
    """An Upstream. `fail` sets the failure of the next requests; `met` is called with its name when a request meets it."""

    def __init__(self, met: Callable[[str], None]) -> None:
        self._offline, self._met = OfflineUpstream(Scenarios.load()), met
        self._due: deque[str] = deque()
        self._answered = ANSWERED

    def fail(self, misfortune: str, times: int) -> bool:
        """Sets the failure of the next requests; may be called from any thread. Returns False and changes nothing if too few
        requests were answered since the last failure."""
        if self._due or self._answered < ANSWERED:
            return False
        self._answered = 0
        self._due.extend([misfortune] * times)
        return True

    @asynccontextmanager
    async def call(self, call: Call) -> AsyncGenerator[Answer]:
        misfortune = self._due.popleft() if call.path == MESSAGES and self._due else None
        if misfortune is None:
            self._answered += call.path == MESSAGES
            async with self._offline.call(call) as answer:
                yield answer
            return
        self._met(misfortune)
        if misfortune in STATUSES:
            yield _refusal(*STATUSES[misfortune])
        elif misfortune == SILENT:
            await asyncio.Event().wait()  # until the client gives up, and this call is cancelled
        else:
            async with self._offline.call(call) as answer:
                yield Answer(answer.status, answer.headers, _broken(answer.chunks, misfortune))


def _refusal(status: int, kind: str) -> Answer:
    async def body() -> AsyncIterator[bytes]:
        yield json.dumps(
            {"type": "error", "error": {"type": kind, "message": "as the run wants it"}}
        ).encode()

    headers = {"content-type": "application/json", **({"retry-after": "1"} if status == 429 else {})}
    return Answer(status, headers, body())


async def _broken(chunks: AsyncIterator[bytes], misfortune: str) -> AsyncIterator[bytes]:
    """Yields the answer up to its second piece of text, and then the failure."""
    sent = 0
    async for chunk in chunks:
        yield chunk
        sent += b"text_delta" in chunk
        if sent == 2:
            break
    if misfortune == CUT:
        raise ConnectionResetError
    yield b"event: content_block_delta\ndata: {not json\n\n"


async def verify(token: str) -> None:
    """Accepts one key only."""
    if token != KEY:
        raise AssertionError("the service sent another key than the one it was given")
