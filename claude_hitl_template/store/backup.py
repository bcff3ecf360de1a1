"""Backs up the whole store to one file and restores it, on either database, consistently while the service writes.

The file is a zip: `backup.json` describes it, `<table>.jsonl` has a table's rows, one per line. It holds
conversations and hashes of API keys and passwords, but no key, and no sessions of browsers.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic.migration import MigrationContext
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError

from claude_hitl_template.errors import ConfigError, HitlError, InvalidInput
from claude_hitl_template.store import json_text
from claude_hitl_template.store.connect import migrate, unusable
from claude_hitl_template.store.notifications import IN_USE
from claude_hitl_template.store.postgres import connect_args, postgres_url
from claude_hitl_template.store.sql import execute
from claude_hitl_template.store.tables import UtcDateTime, api_keys, browser_sessions, metadata, sessions

FORMAT = 1
HEAD = "backup.json"
ROWS = 500  # read and written together
# A restored session of a browser could be one that was ended since: after a restore, users sign in again.
LEFT_OUT = frozenset({browser_sessions.name})


@dataclass(frozen=True)
class Copied:
    """How much went into a backup, or came out of one, and when it was made."""

    sessions: int
    rows: int
    made_at: datetime


def back_up(url: str, path: Path) -> Copied:
    """Writes the store as it is at one moment. `path` is replaced when all of it is written.

    Raises ConfigError, and StoreUnreachable when the database does not answer.
    """
    unfinished = path.with_name(f"{path.name}.part")
    try:
        with _transaction(url, snapshot=True) as connection:
            handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(handle, "wb") as file:
                copied = _write(connection, file)
                file.flush()
                os.fsync(handle)
        unfinished.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", "choose another place") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return copied


def restore(url: str, path: Path, *, force: bool = False) -> Copied:
    """Makes the store what it was when the backup was made: all of it, or nothing changes.

    Raises InvalidInput for a file that is not a backup of this or an older version, ConfigError when the database is in
    use or, without `force`, not empty; StoreUnreachable.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            head = _read_head(archive)
            migrate(url)
            with _transaction(url, snapshot=False) as connection:
                _check_schema(connection, head)
                _check_alone(connection)
                if not force:
                    _check_empty(connection)
                return _read(connection, archive, head)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, HitlError):
            raise
        raise InvalidInput(
            f"{path} is not a backup, or a damaged one ({error}); nothing was changed"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}", "name a file that ./hitl backup made"
        ) from error


def schema(url: str) -> str | None:
    """The newest migration of a database; None if it has no tables yet. Raises ConfigError, StoreUnreachable."""
    with _transaction(url, snapshot=True) as connection:
        return MigrationContext.configure(connection).get_current_revision()


def _write(connection: sa.Connection, file: Any) -> Copied:
    made_at, counts = datetime.now(UTC), dict[str, int]()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        head = {"format": FORMAT, "schema": _revision(connection), "made_at": made_at.isoformat()}
        archive.writestr(HEAD, json.dumps(head))
        for table in metadata.sorted_tables:
            if table.name in LEFT_OUT:
                continue
            with archive.open(f"{table.name}.jsonl", "w", force_zip64=True) as member:
                counts[table.name] = 0
                rows = connection.execution_options(yield_per=ROWS).execute(
                    sa.select(table).order_by(*table.primary_key)
                )
                for row in rows.mappings():
                    plain = {column.name: _plain(row[column]) for column in table.c}
                    member.write(json_text.dumps(plain).encode() + b"\n")
                    counts[table.name] += 1
    return Copied(counts[sessions.name], sum(counts.values()), made_at)


def _read(connection: sa.Connection, archive: zipfile.ZipFile, head: dict[str, Any]) -> Copied:
    counts = dict[str, int]()
    older = str(head["schema"]) < _revision(connection)
    for table in metadata.sorted_tables:
        connection.execute(sa.delete(table))
        counts[table.name] = 0
        if table.name in LEFT_OUT or (older and f"{table.name}.jsonl" not in archive.namelist()):
            continue  # `older`: this version added the table
        for rows in _batches(archive, table):
            connection.execute(sa.insert(table), rows)
            counts[table.name] += len(rows)
    if connection.dialect.name == "postgresql":
        connection.execute(
            sa.text(
                "select setval(pg_get_serial_sequence('transcripts', 'id'), "
                "(select coalesce(max(id), 0) + 1 from transcripts), false)"
            )
        )
    return Copied(counts[sessions.name], sum(counts.values()), datetime.fromisoformat(head["made_at"]))


def _batches(archive: zipfile.ZipFile, table: sa.Table) -> Iterator[list[dict[str, Any]]]:
    times = {column.name for column in table.c if isinstance(column.type, UtcDateTime)}

    def parsed(line: bytes) -> dict[str, Any]:
        row = json.loads(line)
        return {
            column.key: datetime.fromisoformat(row[column.name])
            if column.name in times and row[column.name] is not None
            else row[column.name]
            for column in table.c
            if column.name in row  # what a younger schema added has its default
        }

    with archive.open(f"{table.name}.jsonl") as member:
        while rows := [parsed(line) for line in islice(member, ROWS)]:
            yield rows


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _read_head(archive: zipfile.ZipFile) -> dict[str, Any]:
    head = json.loads(archive.read(HEAD))
    if head["format"] != FORMAT:
        raise InvalidInput(f"the backup is of format {head['format']}, this version reads {FORMAT}")
    datetime.fromisoformat(head["made_at"])
    return head


def _check_schema(connection: sa.Connection, head: dict[str, Any]) -> None:
    ours = _revision(connection)
    if str(head["schema"]) > ours:
        raise InvalidInput(
            f"the backup is of schema {head['schema']}, which is newer than this version's, {ours}; "
            "restore it with the version that made it, or a newer one"
        )


def _check_alone(connection: sa.Connection) -> None:
    """A ledger holds this lock as long as it lives, on whichever machine it is."""
    if connection.dialect.name != "postgresql":
        return
    if not connection.execute(sa.select(sa.func.pg_try_advisory_xact_lock(IN_USE))).scalar_one():
        raise ConfigError(
            "a service uses this database; nothing was changed", "./hitl down, wherever it runs"
        )


def _check_empty(connection: sa.Connection) -> None:
    kept = connection.execute(sa.select(sa.func.count()).select_from(sessions)).scalar_one()
    keys = connection.execute(sa.select(sa.func.count()).select_from(api_keys)).scalar_one()
    if kept or keys:
        raise ConfigError(
            f"the database is not empty ({kept} sessions); nothing was changed",
            "./hitl backup it first, then ./hitl restore --force, which replaces all of it",
        )


def _revision(connection: sa.Connection) -> str:
    found = MigrationContext.configure(connection).get_current_revision()
    if found is None:
        raise ConfigError("there is nothing in the database yet", "start the service once with ./hitl up")
    return found


@contextmanager
def _transaction(url: str, *, snapshot: bool) -> Generator[sa.Connection]:
    engine = _engine(url, snapshot=snapshot)
    try:
        with engine.begin() as connection:
            yield connection
    except DBAPIError as error:
        raise unusable(url, error) from error
    finally:
        engine.dispose()


def _engine(url: str, *, snapshot: bool) -> sa.Engine:
    given = sa.make_url(url)
    if given.get_backend_name() == "sqlite":
        engine = sa.create_engine(
            given.set(drivername="sqlite"), poolclass=sa.pool.NullPool, json_serializer=json_text.dumps
        )
        event.listen(engine, "connect", _undriven)
        begin = "BEGIN" if snapshot else "BEGIN IMMEDIATE"
        event.listen(engine, "begin", partial(execute, statement=begin))
        return engine
    made = postgres_url(url)
    limits = connect_args(made, statement_timeout="0", idle_in_transaction_session_timeout="0")
    return sa.create_engine(
        made,
        poolclass=sa.pool.NullPool,
        connect_args=limits,
        json_serializer=json_text.dumps,
        isolation_level="REPEATABLE READ" if snapshot else "READ COMMITTED",
    )


def _undriven(connection: Any, _record: object) -> None:
    connection.isolation_level = None
