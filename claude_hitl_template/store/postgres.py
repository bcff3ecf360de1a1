"""Postgres backend. Any number of ledgers may share the database; a session's row lock serialises its changes.

The pool survives restarts of the database: it discards a broken connection together with all older ones, and the
caller that held it gets `StoreUnreachable` and repeats the call. This is safe even if the answer to a commit was lost,
because every write of the Store is idempotent.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from claude_hitl_template.errors import ConfigError, StoreUnreachable, Unavailable
from claude_hitl_template.store import json_text
from claude_hitl_template.store.backend import Tx
from claude_hitl_template.store.notifications import Notifier
from claude_hitl_template.store.sql import SqlTx

WRITERS, READERS = 8, 8
CONNECTIONS = WRITERS + READERS + 2  # of one ledger: two for notifications
POOL_TIMEOUT_S = 20.0
ANSWER_S = 25.0  # for a whole transaction; a frozen server sends nothing and would block its callers
CONNECT_TIMEOUT_S = 5
OPTIONS = {
    "timezone": "UTC",
    "lock_timeout": "10s",
    "statement_timeout": "15s",
    # A ledger that stands still in the middle of a transaction must not hold a session's lock indefinitely.
    "idle_in_transaction_session_timeout": "15s",
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "3",
    "tcp_keepalives_count": "3",
}
# What passes by itself, by SQLSTATE: connection, shutdown and start, deadlock, lock and statement timeouts, no slot.
_PASSING = ("08", "57P", "40", "55P03", "57014", "53300", "25P03")


def postgres_url(text: str) -> sa.URL:
    """The database that DATABASE_URL names. Raises ConfigError, which does not show it: it may hold a password."""
    try:
        url = sa.make_url(text)
    except (ArgumentError, ValueError):
        url = None
    if url is None or url.get_backend_name() not in ("postgresql", "postgres"):
        raise ConfigError(
            "DATABASE_URL is not usable: it must begin with postgresql://",
            "write it as postgresql://USER:PASSWORD@HOST:PORT/DATABASE",
        )
    return url.set(drivername="postgresql+psycopg")


def connect_args(url: sa.URL, **options: str) -> dict[str, Any]:
    """Arguments for libpq: keepalives that detect a dead peer, and the server's time limits."""
    chosen = " ".join(f"-c {name}={value}" for name, value in (OPTIONS | options).items())
    return {
        "application_name": "claude-hitl",
        "connect_timeout": CONNECT_TIMEOUT_S,
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
        "options": f"{url.query.get('options', '')} {chosen}".strip(),
    }


class PostgresBackend:
    """`begin(write=True)` transactions of one session follow one another; reads see one snapshot."""

    def __init__(self, url: str, *, answer_s: float = ANSWER_S) -> None:
        self._answer_s = answer_s
        made = postgres_url(url)
        self._writers = _engine(made, WRITERS, isolation_level="READ COMMITTED")
        self._readers = _engine(made, READERS, isolation_level="REPEATABLE READ")
        self.relay = Notifier({**made.translate_connect_args(username="user", database="dbname"), **made.query,
                            **connect_args(made)})  # fmt: skip

    @asynccontextmanager
    async def begin(self, *, write: bool) -> AsyncGenerator[Tx]:
        self.relay.start()
        engine = self._writers if write else self._readers
        try:
            async with asyncio.timeout(self._answer_s), engine.begin() as connection:
                tx = SqlTx(connection, locking=write)
                yield tx
                await tx.flush()
        except TimeoutError as error:
            raise StoreUnreachable(f"the database does not answer within {self._answer_s:g} s") from error
        except (DBAPIError, PoolTimeout) as error:
            raise _explained(error) from error

    async def close(self) -> None:
        await self.relay.close()
        await self._writers.dispose()
        await self._readers.dispose()


def _engine(url: sa.URL, size: int, *, isolation_level: Any) -> AsyncEngine:
    return create_async_engine(
        url,
        pool_size=size,
        max_overflow=0,
        pool_timeout=POOL_TIMEOUT_S,
        isolation_level=isolation_level,
        json_serializer=json_text.dumps,
        json_deserializer=json_text.loads,
        connect_args=connect_args(url),
        hide_parameters=True,
    )


def _explained(error: DBAPIError | PoolTimeout) -> Unavailable:
    if isinstance(error, PoolTimeout):
        return StoreUnreachable(
            f"the database does not keep up: no connection was free for {POOL_TIMEOUT_S:.0f} s"
        )
    state = str(getattr(error.orig, "sqlstate", None) or "")
    reason = str(error.orig).strip().splitlines()[0] if str(error.orig).strip() else type(error.orig).__name__
    if passes(error):
        return StoreUnreachable(f"the database is unreachable ({reason}); the same request may be repeated")
    return Unavailable(
        f"the store cannot be used now ({reason}{f', SQLSTATE {state}' if state else ''}); nothing was changed. "
        "If it goes on, look at the database server's log and its disk"
    )


def passes(error: DBAPIError) -> bool:
    """Whether it is the connection or the moment that failed, and not what was asked."""
    state = getattr(error.orig, "sqlstate", None)
    if state is None:  # the driver's own word: not connected, or connected no more
        return error.connection_invalidated or type(error.orig).__name__ in (
            "OperationalError",
            "ConnectionTimeout",
            "InterfaceError",
        )
    return error.connection_invalidated or str(state).startswith(_PASSING)
