"""Saves the workspace at the end of a turn, and from time to time during one."""

import asyncio
import time
from collections.abc import Callable, Sequence

import structlog

from claude_hitl_template.errors import HitlError
from claude_hitl_template.session.tasks import Spawn, cancel
from claude_hitl_template.workspace.sync import Progress, Workspace, ignore_progress

log = structlog.get_logger()

SAVE_EVERY_S = 3.0  # minimum pause between two saves during a turn; limits what a killed owner loses
SAVE_SHARE = 10  # the pause is at least this many times as long as the last save took


class Autosave:
    """Saves one session's workspace; at most one save runs at a time.

    Args:
        workspace: what to save.
        session_id: for the log.
        spawn: starts a background task.
        on_unsaved: called with one message for each thing that could not be saved; may be empty.
    """

    def __init__(
        self,
        workspace: Workspace,
        session_id: str,
        spawn: Spawn,
        on_unsaved: Callable[[Sequence[str]], None],
    ) -> None:
        self._workspace, self._session_id = workspace, session_id
        self._spawn, self._on_unsaved = spawn, on_unsaved
        self._task: asyncio.Task[None] | None = None
        self._next_at = 0.0  # time.monotonic()

    async def save(self, progress: Progress) -> None:
        """Saves what changed, instead of the save that is planned. Only an unreachable store is an error."""
        await cancel(self._task)
        await self._save(progress)

    def save_soon(self) -> None:
        """Plans a save as soon as the pause since the last one is over."""
        if self._task is None or self._task.done():
            self._task = self._spawn(self._save_later())

    async def stop(self) -> None:
        await cancel(self._task)

    async def _save(self, progress: Progress) -> None:
        began = time.monotonic()
        unsaved = await self._workspace.save(progress)
        took_s = time.monotonic() - began
        self._next_at = time.monotonic() + max(SAVE_EVERY_S, SAVE_SHARE * took_s)
        self._on_unsaved(unsaved)

    async def _save_later(self) -> None:
        await asyncio.sleep(self._next_at - time.monotonic())
        try:
            await self._save(ignore_progress)
        except HitlError as error:  # the next write to the store fails with the same error
            log.warning("workspace not saved meanwhile", session=self._session_id, why=str(error))
