"""Sends the pieces of an answer that is still being written to the ledger: best effort, one call at a time, and only while a
stream wants them."""

import asyncio
from contextlib import suppress
from typing import Any

import structlog

from claude_hitl_template.errors import HitlError
from claude_hitl_template.session.engine import Preview
from claude_hitl_template.session.tasks import Spawn, cancel
from claude_hitl_template.store.protocol import Owners

log = structlog.get_logger()

MAX_PENDING = 10_000  # pieces that wait to be sent; further ones are dropped
GATHER_S = 0.04  # between two calls; less than a person notices


class PreviewSender:
    """Collects previews for GATHER_S and sends them with one call. A failed call loses its pieces."""

    def __init__(self, store: Owners, session_id: str, epoch: int, spawn: Spawn) -> None:
        self._store, self._session_id, self._epoch, self._spawn = store, session_id, epoch, spawn
        self._pending: list[dict[str, Any]] = []
        self._sending: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._wanted = True

    def add(self, piece: Preview) -> None:
        """Queues one piece; drops it if too many are pending, or no stream wanted the beginning of the answer."""
        if len(self._pending) >= MAX_PENDING or (piece.text is not None and not self._wanted):
            return
        self._pending.append(_wire(piece))
        if self._sending is None or self._sending.done():
            self._sending = self._spawn(self._send())

    def hurry(self) -> None:
        """Sends what is pending: the answer is complete and will be committed."""
        self._hurry.set()

    async def stop(self) -> None:
        await cancel(self._sending)

    async def _send(self) -> None:
        while self._pending:
            pieces, self._pending = self._pending, []
            self._hurry.clear()
            try:
                self._wanted = await self._store.preview(self._session_id, self._epoch, pieces)
            except HitlError as error:
                log.debug("preview lost", session=self._session_id, why=str(error))
                continue
            if self._wanted:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._hurry.wait(), GATHER_S)
            else:
                self._pending = [each for each in self._pending if each["type"] == "event_start"]


def _wire(piece: Preview) -> dict[str, Any]:
    """The preview as the wire protocol's `event_start` or `event_delta`."""
    if piece.text is None:
        return {"type": "event_start", "event": {"id": piece.event_id, "type": piece.type}}
    content = {"type": "text", "text": piece.text}
    delta = {"type": "content_delta", "index": 0, "content": content}
    return {"type": "event_delta", "event_id": piece.event_id, "delta": delta}
