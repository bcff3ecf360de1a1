"""Run by alembic: applies the migrations to the URL that `store.opening.migrate` hands over, with the blocking driver.

Everything is one transaction, and one at a time: the second process finds the work done.
"""

from functools import partial
from typing import Any

import sqlalchemy as sa
from alembic import context
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import event

from claude_hitl_template.store.postgres import connect_args, postgres_url
from claude_hitl_template.store.sql import execute
from claude_hitl_template.store.sqlite import BUSY_TIMEOUT_MS
from claude_hitl_template.store.tables import metadata

TURN_S = 120  # how long others may take with their migrations
LOCK_S = 5  # how long ours may wait for a table that the service uses meanwhile; then it fails, and can be repeated
ONE_AT_A_TIME = 0x6D696772617465


def engine() -> sa.Engine:
    url = sa.make_url(context.config.attributes["url"])
    if url.get_backend_name() == "sqlite":
        made = sa.create_engine(url.set(drivername="sqlite"), poolclass=sa.pool.NullPool)
        event.listen(made, "connect", _undriven)
        event.listen(made, "begin", partial(execute, statement="BEGIN IMMEDIATE"))
        return made
    url = postgres_url(url.render_as_string(hide_password=False))
    limits = connect_args(url, lock_timeout=f"{TURN_S}s", statement_timeout="0")
    return sa.create_engine(url, poolclass=sa.pool.NullPool, connect_args=limits)


def _undriven(connection: Any, _record: object) -> None:
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")


def take_turn(connection: sa.Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(ONE_AT_A_TIME)))
        connection.execute(sa.text(f"set local lock_timeout = '{LOCK_S}s'"))


def is_newer(connection: sa.Connection) -> bool:
    """Whether the schema is of a version that this code does not know, and serves all the same (docs/postgres.md)."""
    there = MigrationContext.configure(connection).get_current_revision()
    ours = ScriptDirectory.from_config(context.config).get_current_head()
    return there is not None and ours is not None and there > ours


with engine().begin() as connection:
    take_turn(connection)
    if not is_newer(connection):
        context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
        with context.begin_transaction():
            context.run_migrations()
