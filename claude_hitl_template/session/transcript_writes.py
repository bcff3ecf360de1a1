"""The store as an owner uses it: what the CLI adds to its transcript goes along with the session's next write."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, cast

import structlog

from claude_hitl_template.errors import HitlError
from claude_hitl_template.session.tasks import cancel
from claude_hitl_template.store.protocol import Owners, TranscriptKey, TranscriptPart

log = structlog.get_logger()

WRITE_S = 0.02  # entries that no other write took along by then have one of their own
MOST_ENTRIES = 500  # further ones wait until those are written
# Methods that take entries along, and those that must find them written.
_TAKING = frozenset({"commit", "end_turn"})
_AFTER = frozenset({"load_transcript", "list_transcripts", "delete_transcripts", "defer", "release"})


class TranscriptWrites:
    """Keeps entries for WRITE_S. The SDK waits for each write before it reports the end of a turn, which would come two
    commits later.

    What was not written is kept when a write fails, and the next one fails in its place: the entries' order stays, and no
    turn ends without them.
    """

    def __init__(self, store: Owners) -> None:
        self._store = store
        self._parts: list[TranscriptPart] = []
        self._epoch: int | None = None
        self._writing = asyncio.Lock()
        self._soon: asyncio.Task[None] | None = None

    def of_owner(self) -> Owners:
        return cast(Owners, self)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name not in _TAKING | _AFTER:
            return method

        async def after_transcripts(*args: Any, **kwargs: Any) -> Any:
            if name in _AFTER:
                await self.flush()
                return await method(*args, **kwargs)
            async with self._writing:
                return await self._taking(method, *args, **kwargs)

        return after_transcripts

    async def append_transcript(
        self, key: TranscriptKey, entries: Sequence[Mapping[str, Any]], *, epoch: int | None = None
    ) -> None:
        self._parts.append((key, entries))
        self._epoch = epoch
        if sum(len(some) for _, some in self._parts) > MOST_ENTRIES:
            await self.flush()
        elif self._soon is None or self._soon.done():
            self._soon = asyncio.create_task(self._write_soon())

    async def flush(self) -> None:
        """Writes what is kept."""
        async with self._writing:
            while self._parts:
                key, entries = self._parts[0]
                await self._store.append_transcript(key, entries, epoch=self._epoch)
                del self._parts[0]

    async def close(self) -> None:
        """Writes what is kept, unless the owner has lost the session or the store does not answer."""
        try:
            await self.flush()
        except HitlError as error:
            log.warning("the end of the transcript is not saved", why=str(error))
        await cancel(self._soon)

    async def _write_soon(self) -> None:
        await asyncio.sleep(WRITE_S)
        try:
            await self.flush()
        except HitlError as error:  # the next write of the session raises it
            log.warning("transcript not saved yet", why=str(error))

    async def _taking(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        count = len(self._parts)
        result = await method(*args, **kwargs, transcript=self._parts[:count])
        del self._parts[:count]
        return result
