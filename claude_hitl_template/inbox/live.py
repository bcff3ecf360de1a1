"""Changes of approvals for all open pages of this process: one reader of the ledger, however many pages there are."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager

import structlog

from claude_hitl_template.errors import HitlError, Unavailable
from claude_hitl_template.store.protocol import ApprovalChange, Changes

log = structlog.get_logger()
ASK_S = 30.0  # timeout of one call of the ledger, which answers at once if there are changes
AGAIN_S = 1.0  # after the ledger was unreachable
WAITING = 200  # changes that one page may be behind; it looks at the whole list again then

type Wait = Callable[..., Awaitable[Changes]]
type Note = ApprovalChange | None  # None: something may be missing, so look at the store again
type _Item = Note | Unavailable


class Live:
    """Distributes changes while at least one page listens."""

    def __init__(self, wait_approvals: Wait) -> None:
        self._wait = wait_approvals
        self._queues: set[asyncio.Queue[_Item]] = set()
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def listen(self) -> Generator["Listening"]:
        """What happens from now on, in all workspaces."""
        queue: asyncio.Queue[_Item] = asyncio.Queue(WAITING)
        self._queues.add(queue)
        if self._task is None:
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(self._ended)
        try:
            yield Listening(queue)
        finally:
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
                found = await self._wait(position, timeout_s=ASK_S)
            except HitlError as error:
                log.warning("changes of approvals cannot be read; trying again", why=str(error))
                await asyncio.sleep(AGAIN_S)
                continue
            if not found.complete and position:
                self._send(None)
            position = found.position
            for change in found.changes:
                self._send(change)

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

    def __init__(self, queue: asyncio.Queue[_Item]) -> None:
        self._queue = queue

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
