"""A prepared statement gives the same rows on its short way as through SQLAlchemy."""

import sqlite3
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa

from claude_hitl_template.store import json_text, statements
from claude_hitl_template.store.prepared import Compiled, is_prepared, prepared
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
    engine = sa.create_engine("sqlite://", json_serializer=json_text.dumps)
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


def test_times_are_the_same_text_both_ways_for_they_are_compared_as_text(connection: sa.Connection) -> None:
    whole = AT.replace(microsecond=0).astimezone(timezone(timedelta(hours=9)))
    rows = [{**ROWS[0], "created_at": whole}, {**ROWS[1], "created_at": whole}]
    Compiled(statements.ADD_EVENTS, list(ROWS[0]), connection.dialect).execute(raw(connection), rows[:1])
    connection.execute(statements.ADD_EVENTS, rows[1:])
    texts = raw(connection).execute("SELECT created_at FROM events").fetchall()
    assert texts == [("2030-01-02 03:04:05.000000",)] * 2


def test_a_statement_without_rows_says_how_many_it_changed(connection: sa.Connection) -> None:
    given = {"key": "none", "event_id": "none", "at": AT}
    done = Compiled(statements.SET_PROCESSED, list(given), connection.dialect).execute(raw(connection), given)
    assert (done.rowcount, done.first(), done.all()) == (0, None, [])


def test_every_constant_statement_is_prepared() -> None:
    found = [value for value in vars(statements).values() if isinstance(value, sa.Executable)]
    assert found
    assert all(map(is_prepared, found))
