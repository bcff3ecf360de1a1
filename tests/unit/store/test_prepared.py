"""A prepared statement gives the same rows on its short way as through SQLAlchemy."""

import sqlite3
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa

from claude_hitl_template.store import statements
from claude_hitl_template.store.prepared import Compiled, is_prepared, prepared
from claude_hitl_template.store.rows import to_json
from claude_hitl_template.store.tables import events, metadata

AT = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
ROWS = [
    {
        "session_id": "sesn_\0ü",
        "seq": seq,
        "id": f"sevt_{seq}",
        "type": "user.message",
        "payload": {"text": "ü \u2028 '", "n": [None, 1.5]},
        "created_at": AT,
        "processed_at": at,
    }
    for seq, at in ((1, AT), (2, None))
]


@pytest.fixture
def connection() -> Any:
    engine = sa.create_engine("sqlite://", json_serializer=to_json)
    with engine.connect() as connection:
        metadata.create_all(connection)
        yield connection


def raw(connection: sa.Connection) -> sqlite3.Connection:
    found = connection.connection.driver_connection
    assert isinstance(found, sqlite3.Connection)
    return found


def test_rows_are_written_and_read_the_same_both_ways(connection: sa.Connection) -> None:
    adding = Compiled(statements.ADD_EVENTS, list(ROWS[0]), connection.dialect)
    assert adding.execute(raw(connection), ROWS).rowcount == 2
    query = prepared(
        sa.select(*statements.EVENT, events.c.session_id).where(
            events.c.session_id == sa.bindparam("key"), events.c.created_at <= sa.bindparam("at")
        )
    )
    given = {"key": ROWS[0]["session_id"], "at": AT}
    short = Compiled(query, list(given), connection.dialect).execute(raw(connection), given)
    assert [row._asdict() for row in short] == ROWS
    assert short == connection.execute(query, given).all()
    assert short.first() == short[0]


def test_a_statement_without_rows_says_how_many_it_changed(connection: sa.Connection) -> None:
    given = {"key": "none", "event_id": "none", "at": AT}
    done = Compiled(statements.SET_PROCESSED, list(given), connection.dialect).execute(raw(connection), given)
    assert (done.rowcount, done.first(), done.all()) == (0, None, [])


def test_every_constant_statement_is_prepared() -> None:
    found = [value for value in vars(statements).values() if isinstance(value, sa.Executable)]
    assert found
    assert all(map(is_prepared, found))
