"""What the supervisor and its owners' pool do while something else is amiss: an image that does not come, a stop that is
taken back. Ray is told in a few words what it would say."""

import asyncio
import os
import warnings
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import ray

from claude_hitl_template.cluster import containers
from claude_hitl_template.cluster.containers import Preflight
from claude_hitl_template.config.secret_files import prepare
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.events import UserInterrupt
from claude_hitl_template.domain.models import Agent, Environment, Session
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.testing.memory_backend import MemoryBackend
from tests.contract.asking import message

with warnings.catch_warnings(
    action="ignore", category=DeprecationWarning
):  # Ray Serve's own, as it is imported
    from claude_hitl_template.cluster import actor
    from claude_hitl_template.cluster.owner_pool import OwnerPool
    from claude_hitl_template.cluster.supervisor import HOLD_S, TICK_S, SupervisorService

TICKS = 50
IMAGE = "registry.example/worker:1"


@pytest.fixture
def full_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that has room in principle, and none now."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "memory": 2.0**40})
    monkeypatch.setattr(ray, "available_resources", dict)
    monkeypatch.setattr(ray, "get_actor", _nobody)
    monkeypatch.setattr(actor, "list_named_actors", lambda **_: [])


def _nobody(name: str, **_: Any) -> Any:
    raise ValueError(name)


@pytest.fixture
def pulls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often a podman that has no image, and reaches no registry, was asked to pull one."""
    log = tmp_path / "pulls"
    log.touch()
    program = tmp_path / "podman"
    program.write_text(
        "#!/bin/sh\ncase $1 in\n"
        """info) echo '{"store": {"graphDriverName": "overlay"}}' ;;\n"""
        "image) echo 'Error: image not known' >&2; exit 125 ;;\n"
        f"pull) echo pull >> {log}; echo 'Error: no route to the registry' >&2; exit 125 ;;\nesac\n"
    )
    program.chmod(0o755)
    ids = tmp_path / "ids"
    ids.write_text("ray:200000:65536\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("LOGNAME", "ray")
    monkeypatch.setattr(os, "getuid", lambda: 2000)
    monkeypatch.setattr(containers, "SUBORDINATE_IDS", (ids,))
    return lambda: len(log.read_text().splitlines())


async def _waits(_session: Session, _why: str) -> bool:
    return True


@pytest.mark.usefixtures("full_cluster")
async def test_an_image_that_cannot_be_pulled_is_not_pulled_at_each_tick(
    tmp_path: Path, pulls: Callable[[], int]
) -> None:
    settings = Settings(data_dir=tmp_path, container_image_uri=IMAGE, spare_owners=1)
    pool, before = OwnerPool(settings, Preflight(), _waits), asyncio.all_tasks()
    for _ in range(TICKS):
        pool.tend_spares()
        await asyncio.gather(*(asyncio.all_tasks() - before))
    assert pulls() == 1


async def test_whoever_asks_for_an_image_that_does_not_come_hears_why_without_another_pull(
    pulls: Callable[[], int],
) -> None:
    preflight = Preflight()
    for _ in range(TICKS):
        with pytest.raises(ConfigError, match="no route to the registry"):
            await asyncio.to_thread(preflight.check, IMAGE)
    assert pulls() == 1


class Handle:
    """A ledger without Serve."""

    def __init__(self, store: CoreStore) -> None:
        self._store = store

    def options(self, **_: Any) -> "Handle":
        return self

    @property
    def call(self) -> "Handle":
        return self

    async def remote(self, _capability: str, method: str, *args: Any, **kwargs: Any) -> tuple[bool, Any]:
        return True, await getattr(self._store, method)(*args, **kwargs)


@pytest_asyncio.fixture
async def store() -> CoreStore:
    return CoreStore(MemoryBackend())


@pytest_asyncio.fixture
async def supervisor(
    store: CoreStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_cluster: None
) -> AsyncIterator[SupervisorService]:
    monkeypatch.setenv("HITL_DATA_DIR", str(tmp_path))
    prepare(Settings.load())
    service = SupervisorService(Handle(store))
    yield service
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def wanted(store: CoreStore) -> str:
    """A session that is to run, as the supervisor will say of it that it waits for room."""
    session = await store.create_session(
        "key", agent=Agent(), environment=Environment(), title=None, metadata={}, initial=[message()]
    )
    return session.id


async def attended(store: CoreStore, session_id: str) -> None:
    async with asyncio.timeout(30):
        while not (await store.get_session(session_id)).waits_for_room:
            await asyncio.sleep(0.01)


async def test_a_stop_that_is_taken_back_leaves_a_service_that_starts_sessions(
    store: CoreStore, supervisor: SupervisorService
) -> None:
    assert await supervisor.drained_s() == 0
    assert await supervisor.drain(0.0) == 0
    assert 0 < await supervisor.drained_s() <= HOLD_S
    session_id = await wanted(store)
    await asyncio.sleep(2 * TICK_S)
    assert not (await store.get_session(session_id)).waits_for_room, "it was to start nothing"
    await supervisor.undrain()
    await attended(store, session_id)
    assert await supervisor.drained_s() == 0


async def test_a_stop_whose_caller_is_gone_ends_by_itself(
    store: CoreStore, supervisor: SupervisorService
) -> None:
    await supervisor.drain(-HOLD_S)
    session_id = await wanted(store)
    await attended(store, session_id)


async def test_an_owner_ends_when_nothing_watches_what_it_uses_any_more() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def watch() -> None:
        raise OSError("the process table cannot be read")

    with pytest.raises(OSError, match="process table"):
        await actor.first_of(work(), watch())
    assert ended.is_set()


async def test_an_owner_that_is_done_ends_its_watch() -> None:
    ended = asyncio.Event()

    async def watch() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    await actor.first_of(asyncio.sleep(0.01), watch())
    assert ended.is_set()


async def test_an_interrupted_session_waits_for_room_no_more(
    store: CoreStore, supervisor: SupervisorService
) -> None:
    session_id = await wanted(store)
    await attended(store, session_id)
    await store.archive_session(await _interrupted(store, session_id), "key")
    assert not (await store.get_session(session_id)).waits_for_room
    supervisor.check_health()


async def _interrupted(store: CoreStore, session_id: str) -> str:
    await store.send_events(session_id, "key", [UserInterrupt(type="user.interrupt")], decided_by="ann")
    return session_id
