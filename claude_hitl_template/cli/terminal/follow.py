"""Follows a session's event stream across interruptions, without gaps and repeats."""

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
    """One message of a server-sent event stream. `seq` is None for pings and previews, which are not committed."""

    seq: int | None
    event: WireEvent


def follow(client: Client, session_id: str, after: int, say: Callable[[str], None]) -> Generator[Frame]:
    """Yields committed events as they arrive, until the session ends. An interrupted stream continues after the last event.

    Args:
        client: For the service that has the session.
        session_id: The session.
        after: The number of the event to continue after; 0 for all.
        say: Called with a message when the stream is interrupted.

    Raises:
        NotFound: There is no such session.
        Unavailable, RateLimited: The service did not recover within the client's patience.
    """
    path = f"/v1/sessions/{session_id}/events/stream"
    while True:
        started_at = after
        try:
            for frame in _one_stream(client, path, after):
                after = frame.seq or after
                yield frame
                if frame.event["type"] in ("session.status_terminated", "session.deleted"):
                    return
            session = client.get(f"/v1/sessions/{session_id}")
            if after == started_at and session["status"] == "terminated":  # its last event was before `after`
                return
            say("the event stream ended; going on after the last event")
        except (Unavailable, RateLimited) as error:
            say(
                f"the event stream was interrupted ({str(error).splitlines()[0]}); going on after the last event"
            )
        time.sleep(PAUSE_S)
        client.get(f"/v1/sessions/{session_id}")


def _one_stream(client: Client, path: str, after: int) -> Iterator[Frame]:
    with client.stream(path, after) as lines:
        for frame in frames(lines):
            if frame.seq is not None or frame.event.get("type") == "session.deleted":
                yield frame


def frames(lines: Iterator[str]) -> Iterator[Frame]:
    """The messages in the lines of a `text/event-stream`. An incomplete one at the end of the stream is dropped."""
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
