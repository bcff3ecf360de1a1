"""The Store's backend on SQLite: one process, one writer, readers next to it (WAL), and commits in groups.

Statements run in the event loop's thread: they take microseconds, and a hop to another thread costs more. What can take long
does not: a commit waits for the disk, and some reads scan a table (`sql.SLOW`); those run in threads of their own.
"""

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError

from claude_hitl_template.errors import Unavailable
from claude_hitl_template.store import json_text
from claude_hitl_template.store.backend import Tx
from claude_hitl_template.store.prepared import Compiled, is_prepared
from claude_hitl_template.store.rows import SLOW
from claude_hitl_template.store.sql import SqlTx

BUSY_TIMEOUT_MS = 10_000
READERS = 4
_BEGIN = "BEGIN IMMEDIATE"


def sqlite_url(path: Path) -> str:
    return f"sqlite:///{path}"


class SqliteBackend:
    """`begin(write=True)` transactions follow one another through one connection; reads have their own connections.

    Group commit: while one commit waits for the disk, the transactions that come meanwhile run one after another, each in
    a savepoint, and are committed together. Each returns, or raises, once the commit of its group is on the disk, so that
    no caller learns of a state that could still be lost.
    """

    relay = None

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)
        self._writer: sa.Connection | None = None
        # The future of the commit of what is written; None while everything is committed.
        self._group: asyncio.Future[None] | None = None
        self._committing: asyncio.Task[None] | None = None
        self._idle: list[sa.Connection] = []  # readers
        self._compiled: dict[Any, Compiled] = {}
        self._writing, self._reading = asyncio.Lock(), asyncio.Semaphore(READERS)
        self._disk = ThreadPoolExecutor(1, "sqlite-commit")
        self._threads = ThreadPoolExecutor(READERS, "sqlite-read")

    @asynccontextmanager
    async def begin(self, *, write: bool) -> AsyncGenerator[Tx]:
        try:
            if write:
                async with self._written() as tx:
                    yield tx
            else:
                async with self._read() as tx:
                    yield tx
        except DBAPIError as error:
            raise _explained(error.orig) from error
        except sqlite3.Error as error:
            raise _explained(error) from error

    async def close(self) -> None:
        if self._committing is not None:
            await asyncio.wait({self._committing})
        for connection in (*self._idle, *([self._writer] if self._writer else [])):
            connection.close()
        self._engine.dispose()
        self._disk.shutdown()
        self._threads.shutdown()

    # -- reading

    @asynccontextmanager
    async def _read(self) -> AsyncGenerator[Tx]:
        async with self._reading:
            connection = self._idle.pop() if self._idle else await _in(self._threads, self._engine.connect)
            try:
                with _transaction(connection):
                    yield SqlTx(_Inline(connection, self._threads, self._compiled))
            except BaseException:
                connection.close()
                raise
            self._idle.append(connection)

    # -- writing

    @asynccontextmanager
    async def _written(self) -> AsyncGenerator[Tx]:
        failed: Exception | None = None
        async with self._writing:
            connection, group = await self._joined()
            try:
                with _savepoint(connection):
                    tx = SqlTx(_Inline(connection, self._disk, self._compiled))
                    yield tx
                    await tx.flush()
            except Exception as error:  # noqa: BLE001 - raised below
                failed = error
            finally:
                if not _raw(connection).in_transaction:  # the disk failed, and SQLite undid the whole group
                    self._fail(group, failed)
        try:
            await asyncio.shield(group)
        except asyncio.CancelledError:
            await asyncio.wait({group})  # the caller may check the outcome of its write at once
            raise
        except sqlite3.Error:
            if failed is None:
                raise
        if failed is not None:
            raise failed

    async def _joined(self) -> tuple[sa.Connection, asyncio.Future[None]]:
        """The writer in a transaction, and the future of its commit: those of the open group, or of a new one."""
        writer = self._writer
        if writer is None:
            writer = self._writer = await _in(self._disk, self._engine.connect)
            _raw(writer).execute("PRAGMA busy_timeout=0")  # `_begin_patiently` waits, in a thread
        if self._group is None:
            await self._begin_immediate(_raw(writer))
            self._group = asyncio.get_running_loop().create_future()
            # Each member may have failed by itself, or be cancelled, and not look at the future.
            self._group.add_done_callback(lambda group: group.cancelled() or group.exception())
            self._committing = asyncio.create_task(self._commit(writer, self._group))
        return writer, self._group

    async def _begin_immediate(self, raw: sqlite3.Connection) -> None:
        """Waits for another process that writes, such as a migration, without holding up the event loop."""
        try:
            raw.execute(_BEGIN)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            await _in(self._disk, lambda: _begin_patiently(raw))

    async def _commit(self, connection: sa.Connection, group: asyncio.Future[None]) -> None:
        """Asks for the lock at once, and gets it after those that ask already: they become part of the group."""
        async with self._writing:
            if group.done():  # it failed
                return
            raw = _raw(connection)
            try:
                await _in(self._disk, raw.commit)
            except sqlite3.Error as error:
                self._fail(group, error)
            else:
                self._group = None
                group.set_result(None)

    def _fail(self, group: asyncio.Future[None], error: Exception | None) -> None:
        """Ends the group: nothing of it was kept."""
        if self._writer is not None and _raw(self._writer).in_transaction:
            _raw(self._writer).rollback()
        self._group = None
        if not group.done():
            found = error.orig if isinstance(error, DBAPIError) else error
            known = found if isinstance(found, sqlite3.Error) else sqlite3.OperationalError("rolled back")
            group.set_exception(known)


async def _in(threads: ThreadPoolExecutor, work: Callable[[], Any]) -> Any:
    """Runs to its end even when the caller is cancelled: the connection is in use until then."""
    running = asyncio.get_running_loop().run_in_executor(threads, work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise


class _Inline:
    """A connection whose statements run at once; those that say they are SLOW run in a thread.

    `compiled` has the prepared statements, for all connections of the database.
    """

    def __init__(
        self, connection: sa.Connection, threads: ThreadPoolExecutor, compiled: dict[Any, Compiled]
    ) -> None:
        self._connection, self._threads, self._compiled = connection, threads, compiled
        self.dialect = connection.dialect

    async def execute(
        self, statement: Any, parameters: Any = None, *, execution_options: Mapping[str, Any] | None = None
    ) -> Any:
        if is_prepared(statement):
            return self._prepared(statement, parameters).execute(_raw(self._connection), parameters)
        if not execution_options or not execution_options.get(SLOW):
            return self._connection.execute(statement, parameters)

        def fetched() -> Any:
            frozen = self._connection.execute(statement, parameters).freeze()
            return frozen()

        return await _in(self._threads, fetched)

    def _prepared(self, statement: Any, parameters: Any) -> Compiled:
        found = self._compiled.get(statement)
        if found is None:
            first = parameters[0] if isinstance(parameters, list) else parameters or {}
            found = self._compiled[statement] = Compiled(statement, list(first), self.dialect)
        return found


def _engine(url: str) -> sa.Engine:
    engine = sa.create_engine(
        url,
        json_serializer=json_text.dumps,
        json_deserializer=json_text.loads,
        poolclass=sa.pool.NullPool,
        isolation_level="AUTOCOMMIT",  # transactions are begun and ended here, not by SQLAlchemy
        connect_args={"check_same_thread": False},
    )
    event.listen(engine, "connect", _prepare)
    return engine


def _prepare(connection: Any, _record: Any) -> None:
    connection.isolation_level = None
    for pragma in (
        f"busy_timeout={BUSY_TIMEOUT_MS}",
        "journal_mode=WAL",
        "synchronous=FULL",  # a commit that was acknowledged survives a power cut
        "foreign_keys=ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _raw(connection: sa.Connection) -> sqlite3.Connection:
    return cast(sqlite3.Connection, connection.connection.driver_connection)


def _begin_patiently(raw: sqlite3.Connection) -> None:
    raw.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    try:
        raw.execute(_BEGIN)
    finally:
        raw.execute("PRAGMA busy_timeout=0")


@contextmanager
def _transaction(connection: sa.Connection) -> Generator[None]:
    """Opens a read transaction, so that all reads see one snapshot."""
    raw = _raw(connection)
    raw.execute("BEGIN")
    try:
        yield
    finally:
        raw.rollback()


@contextmanager
def _savepoint(connection: sa.Connection) -> Generator[None]:
    raw = _raw(connection)
    raw.execute("SAVEPOINT one")
    try:
        yield
        raw.execute("RELEASE one")
    except BaseException:
        if raw.in_transaction:
            raw.execute("ROLLBACK TO one")
            raw.execute("RELEASE one")
        raise


def _explained(error: BaseException | None) -> Unavailable:
    return Unavailable(
        f"the store cannot be used now ({error}); nothing was changed. Try again; if it goes on, "
        "check the disk's free space and the data folder's permissions"
    )
