"""The Store over each of its backends, at a time that tests move."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pytest_asyncio

from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.memory import MemoryBackend
from claude_hitl_template.store.sql import SqlBackend, migrate, sqlite_url
from claude_hitl_template.testing.threaded import Threaded, serve_in_thread

KEYS = {"alice": "alice-secret", "bob": "bob-secret"}


class FakeClock:
    def __init__(self) -> None:
        self.now = datetime(2030, 1, 1, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest_asyncio.fixture(scope="session")
async def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database with the newest schema, to be copied."""
    path = tmp_path_factory.mktemp("schema") / "empty.db"
    await asyncio.to_thread(migrate, sqlite_url(path))
    return path


@pytest_asyncio.fixture(params=["memory", "sqlite"])
async def backend(
    request: pytest.FixtureRequest, migrated: Path, tmp_path: Path
) -> AsyncIterator[MemoryBackend | SqlBackend]:
    if request.param == "memory":
        yield MemoryBackend()
        return
    shutil.copy(migrated, tmp_path / "store.db")
    sql = SqlBackend(sqlite_url(tmp_path / "store.db"))
    yield sql
    await sql.close()


@pytest.fixture
def store(backend: MemoryBackend | SqlBackend, clock: FakeClock) -> CoreStore:
    return CoreStore(backend, clock)


@pytest.fixture(scope="session")
def parking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Threaded]:
    """The service on loopback; it parks at once whatever waits for a human."""
    folder = tmp_path_factory.mktemp("parking")
    with serve_in_thread(folder, keys=KEYS, hot_window_s=0.0, idle_timeout_s=0.0) as served:
        yield served


@pytest.fixture(scope="session")
def hot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Threaded]:
    """The service on loopback; it keeps the CLI of whatever waits for a human."""
    folder = tmp_path_factory.mktemp("hot")
    with serve_in_thread(folder, keys=KEYS, hot_window_s=600.0, idle_timeout_s=0.0) as served:
        yield served
