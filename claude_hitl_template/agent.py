"""ClaudeSessionActor: a thin Ray shell around session.py. It holds one session's CLI, and nothing that must last."""

import asyncio
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
import structlog
from ray.util import list_named_actors

from claude_hitl_template import logs
from claude_hitl_template.claude.cli import CliConfig, CliEngine, is_plan_folder
from claude_hitl_template.claude.gate import Gate
from claude_hitl_template.claude.transcripts import TranscriptStore
from claude_hitl_template.errors import EngineError, StaleOwner
from claude_hitl_template.ledger import connect
from claude_hitl_template.models import Session
from claude_hitl_template.session import Limits, SessionRunner
from claude_hitl_template.settings import Settings

log = structlog.get_logger()
NAMESPACE = "claude-hitl"


@dataclass(frozen=True)
class Assignment:
    """What an owner is told to drive. An argument of a call: runtime_env can be read by anyone on the cluster."""

    session: Session
    workspace: str
    run_dir: str
    model_url: str
    token: str
    cli_path: str | None
    limits: Limits


class ClaudeSessionActor:
    """Drives one session until it is parked, lost or taken over; then its process ends.

    It is started without a session, so that one can be kept ready: the start is most of what a resume takes.
    """

    def __init__(self) -> None:
        logs.configure(Settings.load().log_level)
        self._store = connect()
        self._driving: tuple[str, int] | None = None

    async def ready(self) -> int:
        """The process id, once the ledger can be reached."""
        await self._store.ping()
        return os.getpid()

    async def driving(self) -> tuple[str, int] | None:
        """The session and the lease epoch it was told to drive."""
        return self._driving

    async def run(self, assignment: Assignment) -> str:
        """Returns why it ended: "parked", "taken over", or "died: <message>"."""
        session = assignment.session
        self._driving = session.id, session.epoch
        home = Path(assignment.run_dir) / f"{session.id}-{session.epoch}"
        try:
            await asyncio.to_thread(_move_in, home, session.id)
            await self._runner(assignment, home).run()
        except StaleOwner:
            return "taken over"
        except EngineError as error:
            log.warning("engine died", session=session.id, epoch=session.epoch, why=str(error))
            return f"died: {error}"
        finally:
            await asyncio.to_thread(shutil.rmtree, home, True)
        return "parked"

    def _runner(self, assignment: Assignment, home: Path) -> SessionRunner:
        session = assignment.session
        transcripts = TranscriptStore(self._store, session.id, epoch=session.epoch, any_folder=True)
        cli = CliConfig(
            workspace=Path(assignment.workspace),
            config_dir=home / "config",
            model_url=assignment.model_url,
            token=assignment.token,
            cli_path=Path(assignment.cli_path) if assignment.cli_path else None,
        )

        def make_engine(session: Session, gate: Gate) -> CliEngine:
            return CliEngine(session, gate, transcripts, cli)

        return SessionRunner(
            self._store,
            session,
            make_engine=make_engine,
            workspace=cli.workspace,
            is_plan_folder=is_plan_folder(cli.config_dir),
            limits=assignment.limits,
        )


def _move_in(home: Path, session_id: str) -> None:
    """Makes the folder that lasts as long as the owner, the process's temporary folder too: the SDK keeps the
    resumed transcript there. What earlier owners of the session left is removed: they are fenced off, or dead."""
    for left in home.parent.glob(f"{session_id}-*"):
        shutil.rmtree(left, ignore_errors=True)
    home.mkdir(parents=True, mode=0o700)
    tempfile.tempdir = str(home)


def create_actor(name: str, *, cpus: float) -> Any:
    """Starts an owner: detached, so that it outlives whoever started it, and never restarted by Ray."""
    options = {
        "name": name,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "max_restarts": 0,
        "max_task_retries": 0,
        "num_cpus": cpus,
    }
    return ray.remote(ClaudeSessionActor).options(**options).remote()


def get_actor(name: str) -> Any | None:
    """The owner of that name, if it is alive; a session's is called as its lease's holder."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def list_actors() -> list[str]:
    """The names of all owners that are alive, ready ones included."""
    found = cast("list[dict[str, str]]", list_named_actors(all_namespaces=True))
    return [actor["name"] for actor in found if actor["namespace"] == NAMESPACE]


def cleanup_actor(name: str) -> None:
    """Ends an owner, whatever it is doing; the store and the transcript have what it committed."""
    actor = get_actor(name)
    if actor is not None:
        ray.kill(actor, no_restart=True)
