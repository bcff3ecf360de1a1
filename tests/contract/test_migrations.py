"""Migrations produce the tables as declared, on either database; they run while the service does, one at a time."""

import ast
import asyncio
import json
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from claude_hitl_template.domain.events import UserToolConfirmation
from claude_hitl_template.domain.models import Agent, ApprovalState, Environment
from claude_hitl_template.domain.people import Action, Actor
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.store import sql, tables
from claude_hitl_template.store.connect import migrate
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.postgres import PostgresBackend
from claude_hitl_template.store.sqlite import SqliteBackend, sqlite_url
from claude_hitl_template.store.tables import metadata
from tests.postgres import Server


def _schema(path: Path) -> list[tuple[str, str]]:
    connection = sqlite3.connect(path)
    try:
        return sorted(connection.execute("select name, sql from sqlite_master where sql is not null"))
    finally:
        connection.close()


@pytest.fixture(params=["sqlite", "postgres"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Returns the URL of an empty database."""
    if request.param == "sqlite":
        yield sqlite_url(tmp_path / "store.db")
        return
    with request.getfixturevalue("postgres_server").database(migrated=False) as url:
        yield url


@pytest.fixture
def engine(empty: str) -> Iterator[sa.Engine]:
    driver = "sqlite" if empty.startswith("sqlite") else "postgresql+psycopg"
    made = sa.create_engine(sa.make_url(empty).set(drivername=driver), poolclass=sa.pool.NullPool)
    yield made
    made.dispose()


def test_migrations_build_the_schema_of_the_tables(empty: str, engine: sa.Engine):
    migrate(empty)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        inspector = sa.inspect(connection)
        for table in metadata.tables.values():
            built = {i["name"]: i["column_names"] for i in inspector.get_indexes(table.name)}
            for index in table.indexes:
                assert built[index.name] == [c.name for c in index.columns]


@pytest.mark.slow
def test_eight_that_migrate_at_once_take_turns(empty: str, engine: sa.Engine):
    processes = get_context("forkserver")
    processes.set_forkserver_preload(["claude_hitl_template.store.sql"])
    with ProcessPoolExecutor(8, mp_context=processes) as pool:
        assert list(pool.map(migrate, [empty] * 8)) == [None] * 8
    with engine.connect() as connection:
        assert connection.execute(sa.text("select count(*) from alembic_version")).scalar_one() == 1


def test_a_schema_that_is_newer_than_the_code_is_left_as_it_is_and_served(empty: str, engine: sa.Engine):
    migrate(empty)
    with engine.begin() as connection:
        connection.execute(sa.text("update alembic_version set version_num = '9999'"))
        connection.execute(sa.text("alter table sessions add column more varchar"))
    migrate(empty)
    with engine.connect() as connection:
        assert connection.execute(sa.text("select version_num from alembic_version")).scalar_one() == "9999"


async def test_what_a_newer_version_added_to_a_record_is_kept(empty: str, engine: sa.Engine):
    await asyncio.to_thread(migrate, empty)
    backend = SqliteBackend(empty) if empty.startswith("sqlite") else PostgresBackend(empty)
    store = CoreStore(backend)
    made = await store.create_session(
        "key", agent=Agent(), environment=Environment(), title=None, metadata={}, initial=[]
    )
    add_novelties(engine)
    await store.update_session(made.id, "key", changes={"title": "changed by the old version"})
    await backend.close()
    with engine.connect() as connection:
        [doc] = connection.execute(sa.select(tables.sessions.c.doc)).scalars()
    assert (doc["title"], doc.get("novel"), doc["agent"].get("novel")) == (
        "changed by the old version",
        [1],
        2,
    )
    assert doc["agent"]["policy"].get("novel") == 3


def add_novelties(engine: sa.Engine) -> None:
    t = tables.sessions
    with engine.begin() as connection:
        [doc] = connection.execute(sa.select(t.c.doc)).scalars()
        policy = {**doc["agent"]["policy"], "novel": 3}
        newer = {**doc, "novel": [1], "agent": {**doc["agent"], "novel": 2, "policy": policy}}
        connection.execute(sa.update(t).values(doc=newer))


EARLIER = Path(__file__).with_name(
    "rows_of_0.1.0.json"
)  # a session whose call waits, parked; without its transcript


async def test_a_session_that_waits_since_an_earlier_version_is_found_and_its_decision_taken(
    empty: str, engine: sa.Engine
):
    migrate(empty)
    rows: dict[str, list[dict[str, Any]]] = json.loads(EARLIER.read_text())
    with engine.begin() as connection:
        for name, found in rows.items():
            table = metadata.tables[name]
            keys = {column.name: column.key for column in table.columns}
            times = [column.name for column in table.columns if column.name.endswith("_at")]
            for row in found:
                at = {
                    key: datetime.fromisoformat(row[key]).replace(tzinfo=UTC) for key in times if row.get(key)
                }
                values = {keys[name]: value for name, value in (row | at).items()}
                connection.execute(sa.insert(table).values(**values))
    backend = SqliteBackend(empty) if empty.startswith("sqlite") else PostgresBackend(empty)
    try:
        store = CoreStore(backend)
        key = rows["api_keys"][0]["id"]
        await store.set_first_key(rows["api_keys"][0]["secret_hash"])
        identity = await store.find_identity(rows["api_keys"][0]["secret_hash"])
        assert identity is not None
        assert [(one.id, one.default) for one in identity.workspaces] == [(key, True)]
        assert all(identity.principal.may(action, key) for action in Action)
        [waiting] = (await store.list_approvals(key, limit=10, states=[ApprovalState.PENDING])).data
        assert waiting.input["file_path"] == "hello.txt"
        said = {"type": "user.tool_confirmation", "tool_use_id": waiting.event_id, "result": "allow"}
        confirmation = UserToolConfirmation.model_validate(said)
        await store.send_events(waiting.session_id, key, [confirmation], by=Actor(name="ann"))
        entries = (
            await store.list_audit(key, limit=10)
        ).data  # the chain begins with the key's new principal
        assert (entries[0].action, entries[0].target) == ("approval.decided", waiting.id)
        assert [entry.seq for entry in entries] == list(range(len(entries), 0, -1))
        session = await store.get_session(waiting.session_id)
        assert session.status == "running"
        assert session.deferred == waiting.event_id
        assert [found.id for found in await store.supervised()] == [session.id]
        acquired = await store.acquire(session.id, "owner", lease_s=15)
        assert acquired.epoch == rows["sessions"][0]["doc"]["epoch"] + 1
        [allowed] = (await store.list_approvals(key, limit=10, states=[ApprovalState.ALLOWED])).data
        run_digest = str(allowed.run_digest)
        claimed = await store.claim(
            session.id, acquired.epoch, waiting.event_id, run_digest, claim_id="claim"
        )
        assert claimed.state is ApprovalState.CLAIMED
    finally:
        await backend.close()


def test_an_up_to_date_schema_is_migrated_while_its_tables_are_in_use(postgres_server: Server):
    with postgres_server.database(migrated=False) as url:
        migrate(url)
        with psycopg.connect(url) as serving:
            serving.execute("lock table sessions in access exclusive mode")
            migrate(url)


EXPANDING = {"create_table", "create_index", "add_column", "batch_alter_table", "execute"}


def test_migrations_only_expand():
    """The schema that an older version uses must stay: it serves during a migration and for some time after it."""
    for path in sorted((Path(sql.__file__).parent / "migrations" / "versions").glob("*.py")):
        [upgrade] = [
            node
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef) and node.name == "upgrade"
        ]
        calls = [node for node in ast.walk(upgrade) if isinstance(node, ast.Call)]
        named = [c for c in calls if isinstance(c.func, ast.Attribute) and isinstance(c.func.value, ast.Name)]
        used = {c.func.attr for c in named if c.func.value.id in ("op", "batch_op")}  # type: ignore[union-attr]
        assert used <= EXPANDING, f"{path.name} does more than expand"
        for call in named:
            if call.func.attr == "add_column":  # type: ignore[union-attr]
                text = ast.unparse(call)
                assert "nullable=True" in text or "server_default" in text, f"{path.name}: old rows lack it"


def test_partial_indexes_are_partial(tmp_path: Path):
    path = tmp_path / "store.db"
    migrate(sqlite_url(path))
    built = dict(_schema(path))
    for name in ("ix_sessions_supervised", "ix_events_queued", "ix_approvals_due"):
        assert " WHERE " in built[name]


def test_migrating_twice_changes_nothing(tmp_path: Path):
    path = tmp_path / "store.db"
    migrate(sqlite_url(path))
    before = _schema(path)
    migrate(sqlite_url(path))
    assert _schema(path) == before


def test_a_folder_that_is_not_there_is_a_config_error(tmp_path: Path):
    with pytest.raises(ConfigError) as raised:
        migrate(sqlite_url(tmp_path / "missing" / "store.db"))
    assert raised.value.fix
