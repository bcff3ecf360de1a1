"""A Postgres server for tests, with a new database for each test."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psycopg
import pytest

from claude_hitl_template.cli.host.postgres import LocalPostgres, find_program
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.store.connect import migrate

SCHEMA = "schema_of_all"
# What is tested here is what we commit, not what the disk does with it.
HASTY = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "200"}
_numbers = count(1)


def named(url: str, database: str) -> str:
    return f"{url.rpartition('/')[0]}/{database}"


class Server:
    """A server with databases. `url` names none of them."""

    def __init__(self, local: LocalPostgres) -> None:
        self.local = local

    def run(self, statement: str) -> None:
        with psycopg.connect(named(self.local.url, "postgres"), autocommit=True) as connection:
            connection.execute(statement.encode())

    @contextmanager
    def database(self, *, migrated: bool = True) -> Iterator[str]:
        """Yields the URL of a new database, which is dropped afterwards."""
        name = f"test_{next(_numbers)}"
        self.run(f"create database {name} template {SCHEMA if migrated else 'template0'}")
        try:
            yield named(self.local.url, name)
        finally:
            self.run(f"drop database {name} with (force)")


def require() -> None:
    """Skips a test without Postgres, with the reason; CI has it."""
    try:
        find_program("initdb")
    except ConfigError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no Postgres to test with: {error}")


@contextmanager
def serving(options: Mapping[str, str] = HASTY) -> Iterator[Server]:
    require()
    # Not below pytest's folder, which the server's user may not enter.
    folder = Path(tempfile.mkdtemp(prefix="hitl-postgres-"))
    server = Server(LocalPostgres(folder / "postgres", folder / "password"))
    try:
        server.local.start(options)
        server.run(f"create database {SCHEMA}")
        migrate(named(server.local.url, SCHEMA))
        yield server
    finally:
        server.local.stop("immediate")
        shutil.rmtree(folder)
