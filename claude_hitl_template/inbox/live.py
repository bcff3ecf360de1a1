"""Changes of approvals for all open pages of this process: one reader of the ledger, however many pages there are."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager

import structlog

from claude_hitl_template.errors import HitlError
from claude_hitl_template.store.protocol import ApprovalChange, Changes

log = structlog.get_logger()
ASK_S = 30.0  # timeout of one call of the ledger, which answers at once if there are changes
AGAIN_S = 1.0  # after the ledger was unreachable
WAITING = 200  # changes that one page may be behind; it looks at the whole list again then

type Wait = Callable[..., Awaitable[Changes]]
type Note = ApprovalChange | None  # None: something may be missing, so look at the store again


class Live:
    """Distributes changes while at least one page listens."""

    def __init__(self, wait_approvals: Wait) -> None:
        self._wait = wait_approvals
        self._queues: set[asyncio.Queue[Note]] = set()
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def listen(self) -> Generator["Listening"]:
        """What happens from now on, in all workspaces."""
        queue: asyncio.Queue[Note] = asyncio.Queue(WAITING)
        self._queues.add(queue)
        if self._task is None:
            self._task = asyncio.create_task(self._run())
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
            if queue.full():
                while not queue.empty():
                    queue.get_nowait()
                queue.put_nowait(None)
            else:
                queue.put_nowait(note)


class Listening:
    """One page's changes."""

    def __init__(self, queue: asyncio.Queue[Note]) -> None:
        self._queue = queue

    async def next(self, timeout_s: float) -> list[Note]:
        """Those since the last call, as soon as there are any; none after `timeout_s`."""
        found: list[Note] = []
        with contextlib.suppress(TimeoutError):
            found.append(await asyncio.wait_for(self._queue.get(), timeout_s))
        while not self._queue.empty():
            found.append(self._queue.get_nowait())
        return found
