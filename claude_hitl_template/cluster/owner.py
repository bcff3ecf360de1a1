"""An owner drives one session until it parks, fails or is taken over. Does not use Ray: an actor or a task hosts it."""

import asyncio
import contextlib
import shutil
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
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
from claude_hitl_template.session.transcript_writes import TranscriptWrites
from claude_hitl_template.store.protocol import Owners

log = structlog.get_logger()

type OpenStore = Callable[[str], Owners]
type Watch = Callable[[SessionRunner], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class PreparedCli:
    """A CLI that waits for its session.

    `assignment` has neither token nor capability; `starting` returns the error of a CLI
    that did not start.
    """

    assignment: Assignment
    starting: asyncio.Task[CliEngine | EngineError]

    def fits(self, given: Assignment) -> bool:
        """Whether a CLI that was started for this session today would be the same one."""
        mine, its = self.assignment.session, given.session
        same = (its.id, its.epoch, its.workspace_id, its.agent, its.environment, its.manifests)
        if same != (mine.id, mine.epoch, mine.workspace_id, mine.agent, mine.environment, mine.manifests):
            return False
        renewed = replace(self.assignment, session=its, token=given.token, capability=given.capability)
        return renewed == given


class SessionOwner:
    """Drives sessions. `open_store` connects to the ledger with the capability of an assignment."""

    def __init__(self, open_store: OpenStore) -> None:
        self._open_store = open_store
        self._runner: SessionRunner | None = None
        self._prepared: PreparedCli | None = None
        self.driving: tuple[str, int] | None = None

    def make_room(self) -> None:
        """Parks as soon as nothing runs: another session waits for room."""
        if self._runner is not None:
            self._runner.make_room()

    async def prepare(self, assignment: Assignment | None) -> bool:
        """Starts the CLI of a session that does not exist yet; it does nothing before `run` gets the session.

        Args:
            assignment: Without token and capability. None: end the CLI that was prepared.

        Returns:
            Whether there is such a CLI now.
        """
        await self._discard()
        if assignment is None or assignment.sandbox is None or not has_sandboxes():
            return False  # without a sandbox the CLI's token is in its environment
        prepared = self._prepared = PreparedCli(
            assignment, asyncio.create_task(self._start_early(assignment))
        )
        await asyncio.wait({prepared.starting})
        return self._prepared is prepared and isinstance(prepared.starting.result(), CliEngine)

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
        prepared: CliEngine | EngineError | None = None
        try:
            prepared = await self._take_prepared(assignment)
            if prepared is None:
                await asyncio.to_thread(_move_in, home, session.id)
            writes = TranscriptWrites(self._open_store(assignment.capability))
            self._runner = self._make_runner(assignment, writes.of_owner(), prepared)
            try:
                await first_of(self._runner.run(), watch(self._runner) if watch else asyncio.Event().wait())
            finally:
                await writes.close()
        except StaleOwner:
            return "taken over"
        except EngineError as error:
            log.warning("engine died", session=session.id, epoch=session.epoch, why=str(error))
            return f"died: {error}"
        finally:
            if isinstance(prepared, CliEngine):  # the session may have ended before it had a turn
                await prepared.stop()
            await asyncio.to_thread(shutil.rmtree, home, True)
        return PARKED

    # -- a CLI that waits for its session

    async def _start_early(self, assignment: Assignment) -> CliEngine | EngineError:
        session = assignment.session
        await asyncio.to_thread(_move_in, assignment.home, session.id)
        transcripts = TranscriptStore(None, session.id, epoch=session.epoch, any_folder=True)
        engine = CliEngine(session, None, transcripts, _cli_config(assignment), floor=assignment.floor)
        try:
            await engine.start(resume=False, plan_mode=session.agent.permission_mode == "plan")
        except EngineError as error:
            log.info("no cli was prepared", session=session.id, why=str(error))
            return error
        await engine.responds()  # its first answer takes longest
        return engine

    async def _take_prepared(self, assignment: Assignment) -> CliEngine | EngineError | None:
        """Returns the engine that was prepared for this session, or why it did not start; ends one of another session, or
        that does not answer."""
        prepared = self._prepared
        if prepared is not None and prepared.fits(assignment):
            found = await prepared.starting
            if isinstance(found, EngineError) or await found.responds():
                self._prepared = None
                return found
        await self._discard()
        return None

    async def _discard(self) -> None:
        """Ends a prepared CLI, and removes its folders."""
        prepared, self._prepared = self._prepared, None
        if prepared is None:
            return
        starting = prepared.starting
        starting.cancel()
        await asyncio.wait({starting})
        failed = starting.cancelled() or starting.exception() is not None
        if not failed and isinstance(engine := starting.result(), CliEngine):
            await engine.stop()
        await asyncio.to_thread(_move_out, prepared.assignment)

    def _make_runner(
        self, assignment: Assignment, store: Owners, prepared: CliEngine | EngineError | None
    ) -> SessionRunner:
        session, workspace = assignment.session, assignment.workspace
        transcripts = TranscriptStore(store, session.id, epoch=session.epoch, any_folder=True)
        cli = _cli_config(assignment)

        def make_engine(session: Session, gate: Gate) -> CliEngine:
            nonlocal prepared
            if prepared is None:
                return CliEngine(session, gate, transcripts, cli)
            engine, prepared = prepared, None
            if isinstance(engine, EngineError):  # as if it were started now
                raise engine
            engine.bind(session, gate, store, assignment.token)
            return engine

        return SessionRunner(
            store,
            session,
            make_engine=make_engine,
            workspace=workspace,
            is_plan_folder=is_plan_folder(cli.config_dir),
            limits=assignment.limits,
            floor=assignment.floor,
        )


def _cli_config(assignment: Assignment) -> CliConfig:
    folder = assignment.workspace.folder
    return CliConfig(
        workspace=folder,
        config_dir=assignment.home / "config",
        starts=assignment.home.parent / ".starts",
        model_url=assignment.model_url,
        token=assignment.token,
        cli_path=assignment.cli_path,
        layers=image_layers(folder),
        sandbox=assignment.sandbox if has_sandboxes() else None,
    )


def _move_in(home: Path, session_id: str) -> None:
    """Creates the owner's folder and removes those of the session's earlier owners, which are dead or have no lease."""
    for left in home.parent.glob(f"{session_id}-*"):
        shutil.rmtree(left, ignore_errors=True)
    home.mkdir(parents=True, mode=0o700)


def _move_out(assignment: Assignment) -> None:
    """Removes the folders of a session that no owner drove. If it exists meanwhile, its owner makes them again."""
    with contextlib.suppress(OSError):  # not there, or not empty
        assignment.workspace.folder.rmdir()
    shutil.rmtree(assignment.home, ignore_errors=True)


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
