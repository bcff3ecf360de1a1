"""Server-sent events of a page: what its source has, as long as its reader is signed in and may see it."""

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.responses import StreamingResponse

from claude_hitl_template.errors import HitlError, Unavailable

CHECK_S = 5.0  # how often the reader is checked; a page that hears nothing for longer is offline


def frame(event: str, data: Mapping[str, Any]) -> str:
    """One server-sent event with JSON."""
    return f"event: {event}\ndata: {json.dumps(data)}\n\n"


def stream_of(
    source: Callable[[float], Awaitable[Sequence[str]]],
    check: Callable[[], Awaitable[None]],
    close: Callable[[], None],
) -> StreamingResponse:
    """A response that begins with `hello` and has a `ping` every CHECK_S.

    Args:
        source: Returns the next frames as soon as there are any, none after a number of seconds. Raises NotFound once what
            the page shows does not exist any more.
        check: Raises an error once the reader may not see this any more.
        close: Called in the end.
    """
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(_frames(source, check, close), media_type="text/event-stream", headers=headers)


async def _frames(
    source: Callable[[float], Awaitable[Sequence[str]]],
    check: Callable[[], Awaitable[None]],
    close: Callable[[], None],
) -> AsyncIterator[str]:
    checked_at = time.monotonic()
    try:
        yield frame("hello", {})
        while True:
            found = await source(CHECK_S)
            if time.monotonic() - checked_at >= CHECK_S:
                checked_at = time.monotonic()
                await check()
                yield frame("ping", {})
            for text in found:
                yield text
    except Unavailable:
        return  # the page connects again
    except HitlError:
        yield frame("signed-out", {})
    finally:
        close()
