"""Follows a session's event stream, over breaks, without a gap and without a repeat."""

import json
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

from claude_hitl_template.cli.client import Client
from claude_hitl_template.errors import RateLimited, Unavailable

PAUSE_S = 0.5  # between a stream's end and the next attempt
type WireEvent = dict[str, Any]


@dataclass(frozen=True)
class Frame:
    """One message of a server-sent event stream. `seq` is None for what is not committed: pings, previews."""

    seq: int | None
    event: WireEvent


def follow(client: Client, session_id: str, after: int, say: Callable[[str], None]) -> Generator[Frame]:
    """Committed events behind number `after`, as they come, until the session ends.

    A stream that breaks is taken up behind the last event that arrived, and `say` is told. Raises NotFound, and
    Unavailable or RateLimited when the client's patience is at its end.
    """
    path = f"/v1/sessions/{session_id}/events/stream"
    while True:
        begun_at = after
        try:
            for frame in _once(client, path, after):
                after = frame.seq or after
                yield frame
                if frame.event["type"] in ("session.status_terminated", "session.deleted"):
                    return
            session = client.get(f"/v1/sessions/{session_id}")
            if after == begun_at and session["status"] == "terminated":  # its last event was there before
                return
            say("the event stream ended; going on behind the last event")
        except (Unavailable, RateLimited) as error:
            say(f"the event stream broke off ({str(error).splitlines()[0]}); going on behind the last event")
        time.sleep(PAUSE_S)
        client.get(f"/v1/sessions/{session_id}")


def _once(client: Client, path: str, after: int) -> Iterator[Frame]:
    with client.stream(path, after) as lines:
        for frame in frames(lines):
            if frame.seq is not None or frame.event.get("type") == "session.deleted":
                yield frame


def frames(lines: Iterator[str]) -> Iterator[Frame]:
    """The messages in the lines of a `text/event-stream`; one that was cut off by the stream's end is dropped."""
    seq: int | None = None
    data: list[str] = []
    for line in lines:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "id":
            seq = int(value)
        elif field == "data":
            data.append(value)
        elif not line:
            if data:
                yield Frame(seq, json.loads("\n".join(data)))
            seq, data = None, []
