"""Fixtures: the Store over each of its backends, with a clock that tests move."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import pytest_asyncio

from claude_hitl_template.domain.models import Environment, Networking
from claude_hitl_template.domain.policy.floor import Floor
from claude_hitl_template.store.connect import migrate
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.postgres import PostgresBackend
from claude_hitl_template.store.sqlite import SqliteBackend, sqlite_url
from claude_hitl_template.testing.clock import FakeClock
from claude_hitl_template.testing.memory_backend import MemoryBackend
from claude_hitl_template.testing.threaded import Threaded, serve_in_thread
from tests.contract.test_anthropic_sdk import Client
from tests.mutants import MUTANTS
from tests.postgres import Server, serving

KEYS = {"alice": "alice-secret", "bob": "bob-secret"}


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(datetime(2030, 1, 1, 12, tzinfo=UTC))


@pytest_asyncio.fixture(scope="session")
async def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database with the newest schema, from which tests get copies."""
    path = tmp_path_factory.mktemp("schema") / "empty.db"
    await asyncio.to_thread(migrate, sqlite_url(path))
    return path


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def database(postgres_server: Server) -> Iterator[str]:
    """A new database of the Postgres server."""
    with postgres_server.database() as url:
        yield url


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs each test of the Store on each backend. On Postgres, tests that detect a removed safeguard are in the
    fast tier."""
    if "backend" in metafunc.fixturenames:
        missing = {mutant.missed_by for mutant in MUTANTS.values()}
        on_postgres = [] if metafunc.function.__name__ in missing else [pytest.mark.slow]
        backends = ["memory", "sqlite", pytest.param("postgres", marks=on_postgres)]
        metafunc.parametrize("backend", backends, indirect=True)


@pytest_asyncio.fixture
async def backend(
    request: pytest.FixtureRequest, migrated: Path, tmp_path: Path
) -> AsyncIterator[MemoryBackend | SqliteBackend | PostgresBackend]:
    if request.param == "memory":
        yield MemoryBackend()
    elif request.param == "sqlite":
        shutil.copy(migrated, tmp_path / "store.db")
        sql = SqliteBackend(sqlite_url(tmp_path / "store.db"))
        yield sql
        await sql.close()
    else:
        with request.getfixturevalue("postgres_server").database() as url:
            postgres = PostgresBackend(url)
            yield postgres
            await postgres.close()


@pytest.fixture
def store(backend: MemoryBackend | SqliteBackend | PostgresBackend, clock: FakeClock) -> CoreStore:
    return CoreStore(backend, clock)


@pytest.fixture(scope="session")
def environments() -> dict[str, Environment]:
    """The environments of `parking`, `permitting` and `hot`."""
    return {"default": Environment()}


@pytest.fixture
def list_private(
    environments: dict[str, Environment], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """Lists the host and port of a URL as a private host of the default environment, for the sessions of this test."""

    def listed(url: str) -> None:
        networking = Networking(private_hosts=(urlsplit(url).netloc,))
        monkeypatch.setitem(environments, "default", Environment(networking=networking))

    return listed


@pytest.fixture(scope="session")
def parking(
    tmp_path_factory: pytest.TempPathFactory, environments: dict[str, Environment]
) -> Iterator[Threaded]:
    """The service on loopback; it parks calls that wait for a human at once."""
    folder = tmp_path_factory.mktemp("parking")
    with serve_in_thread(
        folder, keys=KEYS, hot_window_s=0.0, idle_timeout_s=0.0, environments=environments
    ) as served:
        yield served


@pytest.fixture(scope="session")
def permitting(
    tmp_path_factory: pytest.TempPathFactory, environments: dict[str, Environment]
) -> Iterator[Threaded]:
    """As `parking`, but the operator lets an agent's policy allow calls without asking."""
    folder, floor = tmp_path_factory.mktemp("permitting"), Floor(default="always_allow")
    with serve_in_thread(
        folder, keys=KEYS, hot_window_s=0.0, idle_timeout_s=0.0, floor=floor, environments=environments
    ) as served:
        yield served


@pytest.fixture(scope="session")
def hot(tmp_path_factory: pytest.TempPathFactory, environments: dict[str, Environment]) -> Iterator[Threaded]:
    """The service on loopback; it keeps the CLI running while calls wait for a human."""
    folder = tmp_path_factory.mktemp("hot")
    with serve_in_thread(
        folder, keys=KEYS, hot_window_s=600.0, idle_timeout_s=0.0, environments=environments
    ) as served:
        yield served


@pytest.fixture(scope="module")
def client(parking: Threaded) -> Iterator[Client]:
    """The official SDK as a client of `parking`."""
    with closing(Client(parking)) as made:
        yield made


@pytest.fixture(scope="module")
def permitted(permitting: Threaded) -> Iterator[Client]:
    """The official SDK as a client of `permitting`."""
    with closing(Client(permitting)) as made:
        yield made
