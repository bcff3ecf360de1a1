"""ClaudeSessionActor: the Ray actor that hosts one owner, which drives one session. It holds no durable state."""

# ruff: noqa: E402 - the collector is off during the imports
import gc

_COLLECTED = gc.isenabled()
gc.disable()  # imports leave no garbage, and are most of an owner's start: looking for some takes a fifth of their time

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Iterable
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import psutil
import ray
import structlog
from ray.util import list_named_actors

from claude_hitl_template import code_version
from claude_hitl_template.claude.limits import DiskUse, over_memory
from claude_hitl_template.cluster.ledger_line import Line, reach
from claude_hitl_template.cluster.owner_host import Assignment, Share
from claude_hitl_template.config import logs
from claude_hitl_template.domain.models import Environment
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.store.protocol import Owners

if TYPE_CHECKING:
    from claude_hitl_template.cluster.owner import SessionOwner
    from claude_hitl_template.session.runner import SessionRunner

log = structlog.get_logger()
NAMESPACE = "claude-hitl"
WATCH_S = 1.0
# The supervisor imports this module, too, to start an owner: it needs neither the SDK nor what drives a session.
OWNER = "claude_hitl_template.cluster.owner"


class ClaudeSessionActor:
    """Starts without a session, so that the pool can keep one ready: most of the time that a resume takes is this start."""

    def __init__(self, log_level: str, ledger: Path | None = None) -> None:
        """`ledger`: its socket on this machine; without one it is called through Ray Serve."""
        logs.configure(log_level)
        self._line = Line(socket=ledger)
        self._code = code_version()
        self._owner: SessionOwner = _imported(OWNER).SessionOwner(self._store)

    async def ready(self) -> int:
        """Returns the process id once the ledger can be reached."""
        await self._line.reached()
        return os.getpid()

    async def code(self) -> str:
        """The version of the code that this process runs, as `code_version` gives it."""
        return self._code

    async def driving(self) -> tuple[str, int] | None:
        """The session and the lease epoch that it drives."""
        return self._owner.driving

    async def make_room(self) -> None:
        """Parks as soon as nothing runs: another session waits for room."""
        self._owner.make_room()

    async def prepare(self, assignment: Assignment | None) -> bool:
        """See `SessionOwner.prepare`."""
        return await self._owner.prepare(assignment)

    def _store(self, capability: str) -> Owners:
        return reach(Owners, self._line, capability)

    async def run(self, assignment: Assignment) -> str:
        """Returns why it ended: "parked", "taken over", or "died: <why>"."""
        # The SDK keeps a resumed transcript in the temporary folder: it lasts no longer than the owner.
        tempfile.tempdir = str(assignment.home)
        try:
            folders = (assignment.home, assignment.workspace.folder)
            return await self._owner.run(
                assignment, watch=partial(watch, share=assignment.share, folders=folders)
            )
        finally:
            await asyncio.to_thread(_end_children)  # the next session of this process starts with none


def _imported(name: str) -> Any:
    gc.disable()
    try:
        return import_module(name)
    finally:
        gc.freeze()  # what is there by now stays
        gc.enable()


async def watch(runner: "SessionRunner", share: Share, folders: Iterable[Path]) -> None:
    """Stops a session that uses more than its share, before the machine's other sessions run out of it. Its files are in the
    folders."""
    await (
        runner.workspace_ready.wait()
    )  # nothing of the session runs before, and it did not write what is restored
    disk = DiskUse(folders, share.disk_bytes)
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
        elif why := await asyncio.to_thread(disk.over):
            await _stop_for(runner, why)
        await asyncio.sleep(WATCH_S)


async def _stop_for(runner: "SessionRunner", reason: str) -> None:
    log.warning("over its share", why=reason)
    runner.stop_for(reason)
    await asyncio.to_thread(_end_children)


def _used() -> tuple[int, int]:
    """Bytes of memory that this process's descendants share with no other process, and the number of descendants."""
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
    ledger: Path | None = None,
) -> Any:
    """Starts an owner: detached, so that it outlives the process that started it, and never restarted by Ray.

    Args:
        name: The actor's name, unique in the namespace.
        environment: The container runs its image.
        share: The resources that Ray reserves for the actor.
        use_container: None: use one if the environment has an image. False: start a local process even if it has one.
        log_level: The level of the actor's log.
        ledger: The ledger's socket on this machine, if it is known. A container does not see it.

    Returns:
        The actor's handle.

    Raises:
        ConfigError: `use_container` is True for an environment without an image.
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
        from claude_hitl_template.cluster.containers import runtime_env  # noqa: PLC0415 - no owner needs it

        options["runtime_env"] = runtime_env(str(environment.image))
    return _actor_class().options(**options).remote(log_level, None if contained else ledger)


@cache
def _actor_class() -> Any:
    """Decorates the class once per process: Ray's GCS keeps a copy of the class for each `ray.remote` call."""
    return ray.remote(ClaudeSessionActor)


def get_actor(name: str) -> Any | None:
    """Returns the owner with this name if it is alive. The holder of a session's lease is the name of its owner."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def list_actors() -> list[str]:
    """Returns the names of all owners that are alive, including spare ones."""
    found = cast("list[dict[str, str]]", list_named_actors(all_namespaces=True))
    return [actor["name"] for actor in found if actor["namespace"] == NAMESPACE]


def cleanup_actor(name: str) -> None:
    """Kills an owner even if it is busy; what it committed is in the store and the transcript."""
    actor = get_actor(name)
    if actor is not None:
        ray.kill(actor, no_restart=True)


if _COLLECTED:
    gc.enable()
