"""A backup is a snapshot of either database and can be restored into either; a restore is complete or has no effect."""

import asyncio
import json
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from itertools import count
from pathlib import Path

import pytest
import sqlalchemy as sa

from claude_hitl_template.domain import events
from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.models import Agent, Environment
from claude_hitl_template.domain.sign_in import ProviderUser
from claude_hitl_template.errors import ConfigError, InvalidInput
from claude_hitl_template.store.backup import Copied, back_up, restore
from claude_hitl_template.store.connect import migrate
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.postgres import PostgresBackend
from claude_hitl_template.store.protocol import Call
from claude_hitl_template.store.sqlite import SqliteBackend, sqlite_url
from claude_hitl_template.store.tables import metadata

KEY = "key_1"
NUMBERS = count()
INPUT = {"command": "echo ä€\u0000😀"}
MAIN = {"project_key": "-", "session_id": "s", "subpath": ""}


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[object]:
    """Returns a function that creates empty databases: `place("sqlite")`, `place("postgres")`."""
    with ExitStack() as stack:

        def make(kind: str) -> str:
            if kind == "postgres":
                server = request.getfixturevalue("postgres_server")
                return stack.enter_context(server.database(migrated=False))
            return sqlite_url(tmp_path / f"{next(NUMBERS)}.db")

        yield make


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[CoreStore]:
    await asyncio.to_thread(migrate, url)
    backend = SqliteBackend(url) if url.startswith("sqlite") else PostgresBackend(url)
    try:
        yield CoreStore(backend)
    finally:
        await backend.close()


async def fill(store: CoreStore, many: int = 3) -> None:
    await store.add_key("first", "hash")
    for n in range(many):
        made = await store.create_session(
            KEY, agent=Agent(), environment=Environment(), title=f"t{n}", metadata={}, initial=[],
            idempotency_key=f"k{next(NUMBERS)}",
        )  # fmt: skip
        await store.acquire(made.id, "owner", lease_s=15)
        call = Call(call_id="t1", tool_name="Bash", input=INPUT, digest=digest(INPUT), verdict="ask")
        await store.open_calls(
            made.id, 1, [events.agent_message("a", "hi")], [call], cwd="/w", expires_at=None
        )
        await store.append_transcript({"scope": made.id, **MAIN}, [{"uuid": "1"}, {"type": "x"}], epoch=1)


def contents(url: str) -> dict[str, list[tuple[object, ...]]]:
    driver = "sqlite" if url.startswith("sqlite") else "postgresql+psycopg"
    engine = sa.create_engine(sa.make_url(url).set(drivername=driver), poolclass=sa.pool.NullPool)
    with engine.connect() as connection:
        found = {
            t.name: connection.execute(sa.select(t).order_by(*t.primary_key)) for t in metadata.sorted_tables
        }
        rows = {name: [tuple(row) for row in result] for name, result in found.items()}
    engine.dispose()
    return rows


@pytest.mark.parametrize("into", ["sqlite", "postgres"])
@pytest.mark.parametrize("of", ["sqlite", "postgres"])
async def test_what_comes_back_is_what_went_in(place: object, tmp_path: Path, of: str, into: str):
    source, target = place(of), place(into)  # type: ignore[operator]
    async with opened(source) as store:
        await fill(store)
    copied = back_up(source, tmp_path / "b.zip")
    assert restore(target, tmp_path / "b.zip") == copied
    assert copied.sessions == 3
    assert contents(target) == contents(source)
    assert (tmp_path / "b.zip").stat().st_mode & 0o077 == 0
    async with opened(target) as store:  # and it can be written on
        [session, *_] = (await store.list_sessions(KEY, limit=9)).data
        await store.append_transcript({"scope": session.id, **MAIN}, [{"uuid": "2"}], epoch=1)
        assert len(await store.load_transcript({"scope": session.id, **MAIN}) or []) == 3


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_a_backup_of_a_store_that_is_written_is_of_one_moment(place: object, tmp_path: Path, kind: str):
    url = place(kind)  # type: ignore[operator]
    async with opened(url) as store:
        await fill(store, 2)
        ended = asyncio.Event()

        async def write() -> None:
            while not ended.is_set():
                await fill(store, 1)

        writing = asyncio.create_task(write())
        try:
            taken = [await asyncio.to_thread(back_up, url, tmp_path / f"{n}.zip") for n in range(5)]
        finally:
            ended.set()
            await writing
        assert taken[-1].sessions > taken[0].sessions
    for n, copied in enumerate(taken):
        target = place("sqlite")  # type: ignore[operator]
        assert restore(target, tmp_path / f"{n}.zip") == copied
        async with opened(target) as store:
            for session in (await store.list_sessions(KEY, limit=1000)).data:
                log = (await store.list_events(session.id, KEY, limit=100)).data
                assert [e.seq for e in log] == list(range(1, session.next_seq))


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_what_is_there_is_replaced_only_when_forced(place: object, tmp_path: Path, kind: str):
    source, target = place("sqlite"), place(kind)  # type: ignore[operator]
    for url, many in ((source, 2), (target, 1)):
        async with opened(url) as store:
            await fill(store, many)
    back_up(source, tmp_path / "b.zip")
    before = contents(target)
    with pytest.raises(ConfigError, match="not empty"):
        restore(target, tmp_path / "b.zip")
    assert contents(target) == before
    restore(target, tmp_path / "b.zip", force=True)
    assert contents(target) == contents(source)


async def test_a_database_that_a_service_uses_is_not_replaced(place: object, tmp_path: Path):
    source, target = place("sqlite"), place("postgres")  # type: ignore[operator]
    for url in (source, target):
        async with opened(url) as store:
            await fill(store, 1)
    back_up(source, tmp_path / "b.zip")
    before = contents(target)
    backend = PostgresBackend(target)
    await CoreStore(backend).ping()
    async with asyncio.timeout(10):
        while not backend.relay.connected:
            await asyncio.sleep(0.01)
    with pytest.raises(ConfigError, match="uses this database"):
        await asyncio.to_thread(restore, target, tmp_path / "b.zip", force=True)
    assert contents(target) == before
    await backend.close()


def _damaged(good: Path, how: str) -> bytes:
    whole = good.read_bytes()
    match how:
        case "cut":
            return whole[: len(whole) // 2]
        case "bent":
            middle = len(whole) // 2
            return (
                whole[:middle] + bytes(b ^ 0xFF for b in whole[middle : middle + 20]) + whole[middle + 20 :]
            )
        case "empty":
            return b""
        case _:
            return b"garbage " * 100


@pytest.mark.parametrize("how", ["cut", "bent", "empty", "garbage"])
async def test_a_damaged_backup_changes_nothing(place: object, tmp_path: Path, how: str):
    source, target = place("sqlite"), place("sqlite")  # type: ignore[operator]
    for url, many in ((source, 30), (target, 1)):
        async with opened(url) as store:
            await fill(store, many)
    back_up(source, tmp_path / "b.zip")
    (tmp_path / "bad.zip").write_bytes(_damaged(tmp_path / "b.zip", how))
    before = contents(target)
    with pytest.raises(InvalidInput, match="nothing was changed"):
        restore(target, tmp_path / "bad.zip", force=True)
    assert contents(target) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": "9999"}, "newer"),
        ({"format": 7}, "format"),
        ({"made_at": "x"}, "damaged"),
        ({"format": None}, "format"),
    ],
)
async def test_a_backup_of_a_newer_version_is_refused(
    place: object, tmp_path: Path, change: dict[str, object], said: str
):
    url = place("sqlite")  # type: ignore[operator]
    async with opened(url) as store:
        await fill(store, 1)
    back_up(url, tmp_path / "b.zip")
    with zipfile.ZipFile(tmp_path / "b.zip") as old, zipfile.ZipFile(tmp_path / "n.zip", "w") as new:
        for name in old.namelist():
            head = {**json.loads(old.read(name)), **change} if name == "backup.json" else None
            new.writestr(name, json.dumps(head) if head else old.read(name))
    with pytest.raises(InvalidInput, match=said):
        restore(url, tmp_path / "n.zip", force=True)


async def test_passwords_come_back_and_sessions_of_browsers_do_not(place: object, tmp_path: Path):
    source, target = place("sqlite"), place("sqlite")  # type: ignore[operator]
    async with opened(source) as store:
        user = await store.put_provider_user(ProviderUser(external_id="i|1", issuer_host="i", name="ann"))
        await store.set_password(user.id, "hash of the password")
        await store.add_browser_session(user.id, "hash of a token", way="provider")
    back_up(source, tmp_path / "b.zip")
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        assert b"hash of a token" not in b"".join(archive.read(name) for name in archive.namelist())
    async with opened(target) as store:
        other = await store.put_provider_user(ProviderUser(external_id="i|2", issuer_host="i", name="bob"))
        await store.add_browser_session(other.id, "hash of another token", way="provider")
    restore(target, tmp_path / "b.zip", force=True)
    async with opened(target) as store:
        found = await store.find_password("ann")
        assert found is not None
        assert found.password_hash == "hash of the password"
        assert await store.list_browser_sessions(user.id) == await store.list_browser_sessions(other.id) == []


async def test_a_backup_of_an_earlier_version_lacks_what_this_one_added(place: object, tmp_path: Path):
    url = place("sqlite")  # type: ignore[operator]
    async with opened(url) as store:
        await fill(store, 1)
    back_up(url, tmp_path / "b.zip")
    with zipfile.ZipFile(tmp_path / "b.zip") as ours, zipfile.ZipFile(tmp_path / "o.zip", "w") as old:
        for name in set(ours.namelist()) - {"workspaces.jsonl", "principals.jsonl"}:
            head = {**json.loads(ours.read(name)), "schema": "0004"} if name == "backup.json" else None
            old.writestr(name, json.dumps(head) if head else ours.read(name))
    restore(url, tmp_path / "o.zip", force=True)
    async with opened(url) as store:
        assert len((await store.list_sessions(KEY, limit=10)).data) == 1
        assert await store.list_workspaces() == []


def test_places_that_cannot_be_used_are_named(place: object, tmp_path: Path):
    url = place("sqlite")  # type: ignore[operator]
    migrate(url)
    with pytest.raises(ConfigError, match="cannot be written"):
        back_up(url, tmp_path / "no" / "b.zip")
    with pytest.raises(ConfigError, match="cannot be read"):
        restore(url, tmp_path / "no.zip")
    assert isinstance(back_up(url, tmp_path / "b.zip"), Copied)
    assert sorted(p.name for p in tmp_path.glob("*.part")) == []
