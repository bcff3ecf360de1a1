"""Server-sent events of one session: committed events in order, previews between them, and pings."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any

from claude_hitl_template.api.auth import Authenticator
from claude_hitl_template.domain.models import new_id, utcnow
from claude_hitl_template.errors import NotFound, Unauthorized
from claude_hitl_template.store.protocol import NOW, Clients

KEEP_ALIVE_S = 10.0
CHECK_KEY_S = 2.0  # how often a stream checks that its key was not revoked
CONNECTED = ": connected\n\n"
PING = "event: ping\ndata: {}\n\n"


@dataclass(frozen=True)
class EventStream:
    """The stream of a session's events for one API key.

    Attributes:
        secret_hash: Of the key that the client presented; the stream ends when it is revoked.
        after: The seq of the last event that the client has.
        previews: The types of events to preview.
    """

    store: Clients
    authenticator: Authenticator
    session_id: str
    key_id: str
    secret_hash: str
    after: int
    previews: frozenset[str]

    async def messages(self) -> AsyncIterator[str]:
        """Yields messages until the session is terminated or deleted, or the key is revoked."""
        yield CONNECTED
        after, previewed = self.after, set[str]()
        position = NOW if self.previews else None
        while await self.authenticator.find(self.secret_hash):
            try:
                waiting = self.store.wait_events(
                    self.session_id, self.key_id, after, timeout_s=KEEP_ALIVE_S, previews=position
                )
                found, previews, newest = await self._while_authorized(waiting)
            except Unauthorized:
                return
            except NotFound:
                yield _message(_deleted())
                return
            position = newest if self.previews else None
            for preview in previews:
                if self._wants(preview, previewed):
                    yield _message(preview)
            for event in found:
                yield _message(event.wire(), event.seq)
                after = event.seq
            if not found and not previews:
                yield PING
            if found and found[-1].type == "session.status_terminated":
                return

    async def _while_authorized[T](self, waiting: Coroutine[Any, Any, T]) -> T:
        """Awaits `waiting`. Raises Unauthorized within a few seconds if the key is revoked meanwhile."""
        task = asyncio.ensure_future(waiting)
        try:
            while not (await asyncio.wait([task], timeout=CHECK_KEY_S))[0]:
                if await self.authenticator.find(self.secret_hash) is None:
                    raise Unauthorized("this API key was revoked")
            return task.result()
        finally:
            task.cancel()

    def _wants(self, preview: dict[str, Any], opened: set[str]) -> bool:
        """True for previews of the wanted types that were seen from their beginning."""
        if preview["type"] == "event_start":
            if preview["event"]["type"] in self.previews:
                opened.add(preview["event"]["id"])
                return True
            return False
        return preview["event_id"] in opened


async def ended() -> AsyncIterator[str]:
    """A stream with nothing more to say."""
    yield CONNECTED


def _deleted() -> dict[str, Any]:
    return {"type": "session.deleted", "id": new_id("sevt"), "processed_at": utcnow().isoformat()}


def _message(event: dict[str, Any], seq: int | None = None) -> str:
    cursor = f"id: {seq}\n" if seq is not None else ""
    return f"{cursor}event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n"
