"""ClaudeSessionActor: a thin Ray shell around session.py. It holds one session's CLI, and nothing that must last."""

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import psutil
import ray
import structlog
from ray.util import list_named_actors

from claude_hitl_template import code_version
from claude_hitl_template.claude.cli_engine import CliConfig, CliEngine, is_plan_folder
from claude_hitl_template.claude.layers import image_layers
from claude_hitl_template.claude.limits import over_memory
from claude_hitl_template.claude.sandbox import SandboxConfig, has_sandboxes
from claude_hitl_template.claude.transcripts import TranscriptStore
from claude_hitl_template.cluster.containers import runtime_env
from claude_hitl_template.cluster.ledger import handle, reach
from claude_hitl_template.config import logs
from claude_hitl_template.domain.models import Environment, Session
from claude_hitl_template.domain.policy.floor import Floor
from claude_hitl_template.errors import ConfigError, EngineError, StaleOwner
from claude_hitl_template.session.gate import Gate
from claude_hitl_template.session.runner import Limits, SessionRunner
from claude_hitl_template.store.protocol import Owners, Reachable
from claude_hitl_template.workspace.sync import Place

log = structlog.get_logger()
NAMESPACE = "claude-hitl"
WATCH_S = 1.0


@dataclass(frozen=True)
class Share:
    """What an awake session may use. Ray sets CPUs and memory aside; memory and processes are watched, and its sandbox has
    hard limits above them (`claude/limits.py`)."""

    cpus: float
    memory_bytes: int
    processes: int


@dataclass(frozen=True)
class Assignment:
    """The session that an owner drives, and with what.

    An argument of a call, because everyone on the cluster can read a runtime_env.
    `token` is for the model endpoint, `capability` for the ledger: both are for this session and this lease alone.
    `sandbox` is None where the operator wants none.
    """

    session: Session
    workspace: Place
    run_dir: str
    model_url: str
    token: str = field(repr=False)
    capability: str = field(repr=False)
    cli_path: str | None
    limits: Limits
    share: Share
    sandbox: SandboxConfig | None
    floor: Floor


class ClaudeSessionActor:
    """Drives one session until it is parked, lost or taken over; then its process ends.

    It is started without a session, so that one can be kept ready: the start is most of what a resume takes.
    """

    def __init__(self, log_level: str) -> None:
        logs.configure(log_level)
        self._ledger = handle()
        self._code = code_version()
        self._driving: tuple[str, int] | None = None
        self._runner: SessionRunner | None = None

    async def ready(self) -> int:
        """The process id, once the ledger can be reached."""
        await reach(Reachable, self._ledger).ping()
        return os.getpid()

    async def code(self) -> str:
        """Which code this process runs, as `code_version` tells it."""
        return self._code

    async def driving(self) -> tuple[str, int] | None:
        """The session and the lease epoch it was told to drive."""
        return self._driving

    async def make_room(self) -> None:
        """Parks as soon as nothing runs: another session waits for room."""
        if self._runner is not None:
            self._runner.make_room()

    async def run(self, assignment: Assignment) -> str:
        """Returns why it ended: "parked", "taken over", or "died: <message>"."""
        session = assignment.session
        self._driving = session.id, session.epoch
        home = Path(assignment.run_dir) / f"{session.id}-{session.epoch}"
        try:
            await asyncio.to_thread(_move_in, home, session.id)
            self._runner = self._make_runner(assignment, home)
            await first_of(self._runner.run(), watch(self._runner, assignment.share))
        except StaleOwner:
            return "taken over"
        except EngineError as error:
            log.warning("engine died", session=session.id, epoch=session.epoch, why=str(error))
            return f"died: {error}"
        finally:
            await asyncio.to_thread(shutil.rmtree, home, True)
        return "parked"

    def _make_runner(self, assignment: Assignment, home: Path) -> SessionRunner:
        session = assignment.session
        store = reach(Owners, self._ledger, assignment.capability)
        transcripts = TranscriptStore(store, session.id, epoch=session.epoch, any_folder=True)
        cli = CliConfig(
            workspace=assignment.workspace.folder,
            config_dir=home / "config",
            model_url=assignment.model_url,
            token=assignment.token,
            cli_path=Path(assignment.cli_path) if assignment.cli_path else None,
            layers=image_layers(assignment.workspace.folder),
            sandbox=assignment.sandbox if has_sandboxes() else None,
        )

        def make_engine(session: Session, gate: Gate) -> CliEngine:
            return CliEngine(session, gate, transcripts, cli)

        return SessionRunner(
            store,
            session,
            make_engine=make_engine,
            workspace=assignment.workspace,
            is_plan_folder=is_plan_folder(cli.config_dir),
            limits=assignment.limits,
            floor=assignment.floor,
        )


def _move_in(home: Path, session_id: str) -> None:
    """Makes the folder that lasts as long as the owner, the process's temporary folder too: the SDK keeps the
    resumed transcript there. What earlier owners of the session left is removed: they are fenced off, or dead."""
    for left in home.parent.glob(f"{session_id}-*"):
        shutil.rmtree(left, ignore_errors=True)
    home.mkdir(parents=True, mode=0o700)
    tempfile.tempdir = str(home)


async def first_of(work: Coroutine[Any, Any, None], watch: Coroutine[Any, Any, None]) -> None:
    """Returns or raises as the first of them that ends, and ends the other: what nothing watches any more must not go on."""
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


async def watch(runner: SessionRunner, share: Share) -> None:
    """Stops a session that uses more than its share, before the machine's other sessions have to pay for it."""
    while True:
        memory_bytes, processes = await asyncio.to_thread(_used)
        if memory_bytes > share.memory_bytes:
            await _stop_for(runner, over_memory(memory_bytes, share.memory_bytes))
        elif processes > share.processes:
            await _stop_for(
                runner,
                f"the session had {processes} processes, and {share.processes} are its share (HITL_SESSION_PROCESSES): "
                "they were stopped. Send a message to go on",
            )
        await asyncio.sleep(WATCH_S)


async def _stop_for(runner: SessionRunner, reason: str) -> None:
    log.warning("over its share", why=reason)
    runner.stop_for(reason)
    await asyncio.to_thread(_end_children)


def _used() -> tuple[int, int]:
    """Memory of this process's descendants that they share with nobody, in bytes; and how many they are."""
    found = _children()
    total = 0
    for process in found:
        with contextlib.suppress(psutil.Error):
            memory = process.memory_info()
            total += memory.rss - getattr(memory, "shared", 0)
    return total, len(found)


def _children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _end_children() -> None:
    for process in _children():
        with contextlib.suppress(psutil.Error):
            process.kill()


def create_actor(
    name: str,
    environment: Environment,
    share: Share,
    *,
    use_container: bool | None = None,
    log_level: str = "INFO",
) -> Any:
    """Starts an owner: detached, so that it outlives whoever started it, and never restarted by Ray.

    In a container of the environment's image, or as a local process. `use_container`: None: as the environment says.
    True for an environment without an image raises ConfigError.
    """
    if use_container and environment.image is None:
        raise ConfigError(
            f"environment {environment.id!r} has no image", "set CONTAINER_IMAGE_URI or HITL_ENVIRONMENTS"
        )
    contained = environment.image is not None and use_container is not False
    options: dict[str, Any] = {
        "name": name,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "max_restarts": 0,
        "max_task_retries": 0,
        "num_cpus": share.cpus,
        "memory": share.memory_bytes,
    }
    if contained:
        options["runtime_env"] = runtime_env(str(environment.image))
    return ray.remote(ClaudeSessionActor).options(**options).remote(log_level)


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


def room() -> tuple[float, int]:
    """CPUs and bytes of memory that Ray has not set aside. A second old at times."""
    free = ray.available_resources()
    return free.get("CPU", 0.0), int(free.get("memory", 0))


def largest_room() -> tuple[float, int]:
    """CPUs and bytes of memory of the cluster, all of it."""
    whole = ray.cluster_resources()
    return whole.get("CPU", 0.0), int(whole.get("memory", 0))
