"""An owner drives one session until it parks, fails or is taken over. Does not use Ray: an actor or a task hosts it."""

import asyncio
import shutil
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import structlog

from claude_hitl_template.claude.cli_engine import CliConfig, CliEngine, is_plan_folder
from claude_hitl_template.claude.layers import image_layers
from claude_hitl_template.claude.sandbox import has_sandboxes
from claude_hitl_template.claude.transcripts import TranscriptStore
from claude_hitl_template.cluster.owner_host import PARKED, Assignment
from claude_hitl_template.domain.models import Session
from claude_hitl_template.errors import EngineError, StaleOwner
from claude_hitl_template.session.gate import Gate
from claude_hitl_template.session.runner import SessionRunner
from claude_hitl_template.store.protocol import Owners

log = structlog.get_logger()

type OpenStore = Callable[[str], Owners]
type Watch = Callable[[SessionRunner], Coroutine[Any, Any, None]]


class SessionOwner:
    """Drives sessions. `open_store` connects to the ledger with the capability of an assignment."""

    def __init__(self, open_store: OpenStore) -> None:
        self._open_store = open_store
        self._runner: SessionRunner | None = None
        self.driving: tuple[str, int] | None = None

    def make_room(self) -> None:
        """Parks as soon as nothing runs: another session waits for room."""
        if self._runner is not None:
            self._runner.make_room()

    async def run(self, assignment: Assignment, *, watch: Watch | None = None) -> str:
        """Drives the session to its end.

        Args:
            assignment: The session, and what it needs.
            watch: Runs as long as the session does, and ends it by returning or raising.

        Returns:
            "parked", "taken over", or "died: <why>".
        """
        session = assignment.session
        self.driving = session.id, session.epoch
        home = assignment.home
        try:
            await asyncio.to_thread(_move_in, home, session.id)
            self._runner = self._make_runner(assignment, home)
            await first_of(self._runner.run(), watch(self._runner) if watch else asyncio.Event().wait())
        except StaleOwner:
            return "taken over"
        except EngineError as error:
            log.warning("engine died", session=session.id, epoch=session.epoch, why=str(error))
            return f"died: {error}"
        finally:
            await asyncio.to_thread(shutil.rmtree, home, True)
        return PARKED

    def _make_runner(self, assignment: Assignment, home: Path) -> SessionRunner:
        session, workspace = assignment.session, assignment.workspace
        store = self._open_store(assignment.capability)
        transcripts = TranscriptStore(store, session.id, epoch=session.epoch, any_folder=True)
        cli = CliConfig(
            workspace=workspace.folder,
            config_dir=home / "config",
            model_url=assignment.model_url,
            token=assignment.token,
            cli_path=assignment.cli_path,
            layers=image_layers(workspace.folder),
            sandbox=assignment.sandbox if has_sandboxes() else None,
        )

        def make_engine(session: Session, gate: Gate) -> CliEngine:
            return CliEngine(session, gate, transcripts, cli)

        return SessionRunner(
            store,
            session,
            make_engine=make_engine,
            workspace=workspace,
            is_plan_folder=is_plan_folder(cli.config_dir),
            limits=assignment.limits,
            floor=assignment.floor,
        )


def _move_in(home: Path, session_id: str) -> None:
    """Creates the owner's folder and removes those of the session's earlier owners, which are dead or have no lease."""
    for left in home.parent.glob(f"{session_id}-*"):
        shutil.rmtree(left, ignore_errors=True)
    home.mkdir(parents=True, mode=0o700)


async def first_of(work: Coroutine[Any, Any, Any], watch: Coroutine[Any, Any, Any]) -> None:
    """Runs both until one ends, cancels the other, and returns or raises as the first. So no work runs unwatched."""
    tasks = asyncio.create_task(work), asyncio.create_task(watch)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
