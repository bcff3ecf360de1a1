"""What the migrations build is what the tables say."""

import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from claude_hitl_template.errors import ConfigError
from claude_hitl_template.store.sql import migrate, sqlite_url
from claude_hitl_template.store.tables import metadata


def _schema(path: Path) -> list[tuple[str, str]]:
    connection = sqlite3.connect(path)
    try:
        return sorted(connection.execute("select name, sql from sqlite_master where sql is not null"))
    finally:
        connection.close()


def test_migrations_build_the_schema_of_the_tables(tmp_path: Path):
    path = tmp_path / "store.db"
    migrate(sqlite_url(path))
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        inspector = sa.inspect(connection)
        for table in metadata.tables.values():
            built = {i["name"]: i["column_names"] for i in inspector.get_indexes(table.name)}
            for index in table.indexes:
                assert built[index.name] == [c.name for c in index.columns]
    engine.dispose()


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
    assert raised.value.mend
