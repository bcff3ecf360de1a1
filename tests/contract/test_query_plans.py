"""Frequent queries read no more rows with thousands of parked sessions than with a few."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from claude_hitl_template.domain.models import Agent, ApprovalState, Environment, utcnow
from claude_hitl_template.store.connect import migrate
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.filters import AuditFilter
from claude_hitl_template.store.sqlite import SqliteBackend, sqlite_url

PENDING = [ApprovalState.PENDING]


@contextmanager
def statements() -> Iterator[list[str]]:
    """Yields a list that collects what is sent to databases that are opened meanwhile, with its parameters in it."""
    found: list[str] = []

    def trace(connection: sqlite3.Connection, _record: Any) -> None:
        connection.set_trace_callback(found.append)

    sa.event.listen(sa.Engine, "connect", trace)
    try:
        yield found
    finally:
        sa.event.remove(sa.Engine, "connect", trace)


def plans(path: Path, said: list[str]) -> list[str]:
    with sqlite3.connect(path) as connection:
        selects = [sql for sql in said if sql.startswith("SELECT")]
        assert selects
        found = [row[3] for sql in selects for row in connection.execute(f"explain query plan {sql}")]
    connection.close()
    return found


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(lambda store, _: store.supervised(), id="what the supervisor asks each second"),
        pytest.param(lambda store, _: store.expire_due(), id="what has expired"),
        pytest.param(lambda store, _: store.list_approvals("key", limit=100, states=PENDING), id="the inbox"),
        pytest.param(lambda store, _: store.list_approvals(None, limit=100, states=PENDING), id="the inbox of all keys"),
        pytest.param(lambda store, _: store.list_waiting(["key"], limit=50), id="the inbox by severity"),
        pytest.param(lambda store, _: store.list_waiting(None, limit=50), id="the inbox of all workspaces by severity"),
        pytest.param(lambda store, _: store.list_approvals("key", limit=100), id="approvals in any state"),
        pytest.param(lambda store, _: store.list_sessions("key", limit=100), id="sessions"),
        pytest.param(lambda store, _: store.list_sessions("key", limit=9, statuses=["running"]), id="running sessions"),
        pytest.param(lambda store, _: store.find_identity("hash"), id="a key"),
        pytest.param(lambda store, session: store.list_events(session, "key", limit=100), id="a log"),
        pytest.param(lambda store, _: store.retire(utcnow() - timedelta(hours=1)), id="what is old"),
        pytest.param(lambda store, session: store.last_seq(session, "key"), id="a cursor"),
        pytest.param(lambda store, _: store.list_audit("key", limit=9), id="the audit log"),
        pytest.param(lambda store, _: store.list_audit("key", limit=9, matching=AuditFilter(action="a")), id="of an action"),
        pytest.param(lambda store, _: store.list_audit("key", limit=9, matching=AuditFilter(actor="a")), id="of an actor"),
        pytest.param(lambda store, _: store.list_audit("key", limit=9, matching=AuditFilter(target="a")), id="on a target"),
        pytest.param(lambda store, _: store.list_deliveries("key", limit=9), id="notifications"),
        pytest.param(lambda store, session: store.list_deliveries("key", limit=9, session_id=session), id="of a session"),
        pytest.param(lambda store, _: store.list_deliveries("key", limit=9, channel_id="c"), id="of a channel"),
        pytest.param(lambda store, _: store.export_audit("key", after=3, up_to=9), id="an export"),
    ],
)  # fmt: skip
async def test_an_index_has_the_rows_in_order(asked: Any, tmp_path: Path):
    with statements() as said:
        path, session_id, backend = await _a_session(tmp_path)
        said.clear()
        await asked(CoreStore(backend), session_id)
    await backend.close()
    for step in plans(path, said):
        assert step.startswith("SEARCH") or step == "SCAN sessions USING INDEX ix_sessions_supervised", step


@pytest.mark.parametrize("key", ["key", None])
async def test_the_approvals_of_a_session_are_looked_for_among_its_own(key: str | None, tmp_path: Path):
    with statements() as said:
        path, session_id, backend = await _a_session(tmp_path)
        said.clear()
        await CoreStore(backend).list_approvals(key, limit=100, states=PENDING, session_id=session_id)
    await backend.close()
    assert plans(path, said)[0] == "SEARCH approvals USING INDEX ix_approvals_session (session_id=?)"


async def _a_session(folder: Path) -> tuple[Path, str, SqliteBackend]:
    path = folder / "store.db"
    migrate(sqlite_url(path))
    backend = SqliteBackend(sqlite_url(path))
    made = await CoreStore(backend).create_session(
        "key", agent=Agent(), environment=Environment(), title=None, metadata={}, initial=[]
    )
    return path, made.id, backend
