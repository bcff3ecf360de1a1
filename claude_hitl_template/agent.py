"""ClaudeSessionActor: a thin Ray shell around session.py. It holds one session's CLI, and nothing that must last."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import structlog

from claude_hitl_template.claude.cli import CliConfig, CliEngine, is_plan_folder
from claude_hitl_template.claude.gate import Gate
from claude_hitl_template.claude.transcripts import TranscriptStore
from claude_hitl_template.errors import EngineError, StaleOwner
from claude_hitl_template.ledger import connect
from claude_hitl_template.models import Session
from claude_hitl_template.session import Limits, SessionRunner

log = structlog.get_logger()
NAMESPACE = "claude-hitl"


@dataclass(frozen=True)
class ActorConfig:
    """Handed to the actor as an argument: runtime_env variables can be read by anyone on the cluster."""

    session: Session
    workspace: str
    run_dir: str
    model_url: str
    token: str
    cli_path: str | None
    limits: Limits


def actor_name(session_id: str) -> str:
    return f"claude-session-{session_id}"


class ClaudeSessionActor:
    """Drives one session until it is parked, lost or taken over; then its process ends."""

    def __init__(self, config: ActorConfig) -> None:
        self._config = config

    async def run(self) -> str:
        """Returns why it ended: "parked", "taken over", or "died: <message>"."""
        session = self._config.session
        try:
            await self._runner(session).run()
        except StaleOwner:
            return "taken over"
        except EngineError as error:
            log.warning("engine died", session=session.id, epoch=session.epoch, why=str(error))
            return f"died: {error}"
        return "parked"

    async def ping(self) -> int:
        """The process id."""
        return os.getpid()

    def _runner(self, session: Session) -> SessionRunner:
        store, config = connect(), self._config
        transcripts = TranscriptStore(store, session.id, epoch=session.epoch, any_folder=True)
        cli = CliConfig(
            workspace=Path(config.workspace),
            config_dir=Path(config.run_dir) / f"{session.id}-{session.epoch}",
            model_url=config.model_url,
            token=config.token,
            cli_path=Path(config.cli_path) if config.cli_path else None,
        )

        def make_engine(session: Session, gate: Gate) -> CliEngine:
            return CliEngine(session, gate, transcripts, cli)

        return SessionRunner(
            store,
            session,
            make_engine=make_engine,
            workspace=cli.workspace,
            is_plan_folder=is_plan_folder(cli.config_dir),
            limits=config.limits,
        )


def create_actor(config: ActorConfig, *, cpus: float) -> Any:
    """Starts the session's owner: detached, so that it outlives whoever started it, and never restarted by Ray."""
    options = {
        "name": actor_name(config.session.id),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "max_restarts": 0,
        "max_task_retries": 0,
        "num_cpus": cpus,
    }
    return ray.remote(ClaudeSessionActor).options(**options).remote(config)


def get_actor(session_id: str) -> Any | None:
    """The session's owner if it is alive."""
    try:
        return ray.get_actor(actor_name(session_id), namespace=NAMESPACE)
    except ValueError:
        return None


def cleanup_actor(session_id: str) -> None:
    """Ends the session's owner, whatever it is doing; the store and the transcript have what it committed."""
    actor = get_actor(session_id)
    if actor is not None:
        ray.kill(actor, no_restart=True)
