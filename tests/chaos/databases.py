"""Faults of the databases of a chaos run, and reads of a database while its service is down."""

import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg

from claude_hitl_template.cli.host.postgres import LocalPostgres
from claude_hitl_template.domain.models import Session

SESSIONS = "select doc from sessions"


class Sqlite:
    def __init__(self, path: Path) -> None:
        self._path = path

    def lock(self, for_s: float) -> None:
        """Blocking."""
        with closing(sqlite3.connect(self._path, timeout=30)) as database:
            database.isolation_level = None
            database.execute("begin immediate")
            time.sleep(for_s)
            database.execute("rollback")

    def sessions(self) -> list[Session]:
        with closing(sqlite3.connect(self._path, timeout=30)) as database:
            return [_session(doc) for [doc] in database.execute(SESSIONS)]


class Postgres:
    """The run's own Postgres server. `settings` are used to start it again."""

    def __init__(self, local: LocalPostgres, settings: dict[str, str]) -> None:
        self._local, self._settings = local, settings

    def cut(self) -> int:
        """Ends all sessions of the database, and returns their number."""
        ours = "select count(pg_terminate_backend(pid)) from pg_stat_activity where pid <> pg_backend_pid()"
        with psycopg.connect(self._local.url, autocommit=True) as connection:
            row: Any = connection.execute(f"{ours} and datname = current_database()").fetchone()
        return row[0]

    def stop(self, for_s: float) -> None:
        """Blocking."""
        self._local.stop("immediate")
        time.sleep(for_s)
        self._local.start(self._settings)

    def sessions(self) -> list[Session]:
        with psycopg.connect(self._local.url, autocommit=True) as connection:
            return [_session(doc) for [doc] in connection.execute(SESSIONS)]


def _session(doc: Any) -> Session:
    return Session.model_validate(json.loads(doc) if isinstance(doc, str) else doc)
