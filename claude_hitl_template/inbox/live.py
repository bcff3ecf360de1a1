"""Changes of approvals for all open pages of this process: one reader of the ledger, however many pages there are."""

import asyncio
import contextlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import batched
from typing import Protocol

import structlog

from claude_hitl_template.domain.models import ApprovalState
from claude_hitl_template.errors import HitlError, Unavailable
from claude_hitl_template.store.protocol import ApprovalChange, Changes, WaitingCall

log = structlog.get_logger()
ASK_S = 30.0  # timeout of one call of the ledger, which answers at once if there are changes
AGAIN_S = 1.0  # after the ledger was unreachable
READ = 50  # calls that are read at once
WAITING = 200  # batches of changes that one page may be behind; it looks at the whole list again then


class Approvals(Protocol):
    """The methods of the Store that are used here."""

    async def wait_approvals(self, after: int, *, timeout_s: float) -> Changes: ...
    async def get_waiting(
        self, approval_ids: Sequence[str], workspace_ids: Sequence[str] | None
    ) -> list[WaitingCall]: ...


class Batch:
    """Changes that became known together, and what pages show of them, read and rendered once for all pages.

    `rendered` holds pieces of HTML by whatever tells them apart.
    """

    def __init__(self, changes: Sequence[ApprovalChange], store: Approvals) -> None:
        self.changes, self._store = changes, store
        self.rendered: dict[Hashable, str] = {}
        self._reading: asyncio.Task[Mapping[str, WaitingCall]] | None = None

    async def calls(self) -> Mapping[str, WaitingCall]:
        """Those that still wait, by the approval's id. Raises what the ledger raises."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
            # The pages may have gone when it fails, and then its exception would count as never retrieved.
            self._reading.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return await asyncio.shield(self._reading)

    async def _read(self) -> Mapping[str, WaitingCall]:
        ids = dict.fromkeys(change.id for change in self.changes if change.state is ApprovalState.PENDING)
        found: list[WaitingCall] = []
        for some in batched(ids, READ):
            found += await self._store.get_waiting(some, None)
        return {call.id: call for call in found}


type Note = Batch | None  # None: something may be missing, so look at the store again
type _Item = Note | Unavailable


class Live:
    """Distributes changes while at least one page listens."""

    def __init__(self, store: Approvals) -> None:
        self._store = store
        self._queues: set[asyncio.Queue[_Item]] = set()
        self._task: asyncio.Task[None] | None = None

    def listen(self) -> "Listening":
        """What happens from now on, in all workspaces. `close` it in the end."""
        queue: asyncio.Queue[_Item] = asyncio.Queue(WAITING)
        self._queues.add(queue)
        if self._task is None:
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(self._ended)
        return Listening(queue, self._leave)

    def _leave(self, queue: "asyncio.Queue[_Item]") -> None:
        self._queues.discard(queue)
        if not self._queues:
            self._stop()

    def _stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Ends the streams of a reader that failed: their pages connect again, and start another one."""
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        log.error("the reader of changes failed", exc_info=error)
        self._task = None
        for queue in self._queues:
            _put(queue, Unavailable("changes of approvals cannot be read"))

    async def _run(self) -> None:
        position = 0
        while True:
            try:
                found = await self._store.wait_approvals(position, timeout_s=ASK_S)
            except HitlError as error:
                log.warning("changes of approvals cannot be read; trying again", why=str(error))
                await asyncio.sleep(AGAIN_S)
                continue
            if not found.complete and position:
                self._send(None)
            position = found.position
            if found.changes:
                self._send(Batch(found.changes, self._store))

    def _send(self, note: Note) -> None:
        for queue in self._queues:
            _put(queue, note)


def _put(queue: "asyncio.Queue[_Item]", item: _Item) -> None:
    if queue.full():
        while not queue.empty():
            queue.get_nowait()
        item = item if isinstance(item, Unavailable) else None
    queue.put_nowait(item)


class Listening:
    """One page's changes."""

    def __init__(self, queue: asyncio.Queue[_Item], leave: Callable[[asyncio.Queue[_Item]], None]) -> None:
        self._queue, self._leave = queue, leave

    def close(self) -> None:
        self._leave(self._queue)

    async def next(self, timeout_s: float) -> list[Note]:
        """Those since the last call, as soon as there are any; none after `timeout_s`. Raises Unavailable once they cannot
        be read any more."""
        found: list[_Item] = []
        with contextlib.suppress(TimeoutError):
            found.append(await asyncio.wait_for(self._queue.get(), timeout_s))
        while not self._queue.empty():
            found.append(self._queue.get_nowait())
        notes: list[Note] = []
        for item in found:
            if isinstance(item, Unavailable):
                raise item
            notes.append(item)
        return notes
