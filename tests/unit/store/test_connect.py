"""Which database is used, what is said when it cannot be, and that its password is not in it."""

import traceback
from pathlib import Path

import pytest
from pydantic import SecretStr

from claude_hitl_template.config.secret_files import prepare, read_database_url
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.store.connect import check_replicas, open_backend, store_url
from claude_hitl_template.store.postgres import PostgresBackend, postgres_url
from claude_hitl_template.store.sqlite import SqliteBackend

URL = "postgresql://me:hunter2@127.0.0.1:1/there"


def settings(folder: Path, url: str | None = None, **more: object) -> Settings:
    made = Settings.load()
    given = {"data_dir": folder, "database_url": SecretStr(url) if url else None, **more}
    return made.model_copy(update=given)


def test_without_a_url_it_is_sqlite_in_the_data_folder(tmp_path: Path):
    backend = open_backend(settings(tmp_path), patience_s=0)
    assert isinstance(backend, SqliteBackend)
    assert (tmp_path / "hitl.sqlite3").exists()


def test_the_service_finds_the_url_in_a_file_that_only_its_user_reads(tmp_path: Path):
    prepare(settings(tmp_path, URL))
    file = tmp_path / "secrets" / "database-url"
    assert file.stat().st_mode & 0o077 == 0
    assert store_url(settings(tmp_path)) == URL
    prepare(settings(tmp_path))
    assert read_database_url(settings(tmp_path)) is None


@pytest.mark.parametrize(
    "url",
    ["mysql://me:hunter2@h/d", "hunter2", "://hunter2", "postgresql://me:hunter2@h:port/d", "sqlite:///x"],
)
def test_a_url_that_is_not_usable_says_so_and_not_what_it_is(url: str):
    with pytest.raises(ConfigError, match="DATABASE_URL") as raised:
        postgres_url(url)
    assert "hunter2" not in "".join(traceback.format_exception(raised.value))
    assert raised.value.fix


def test_a_database_that_does_not_answer_is_named_without_its_password(tmp_path: Path):
    with pytest.raises(ConfigError, match="does not answer") as raised:
        open_backend(settings(tmp_path, URL), patience_s=0)
    assert "hunter2" not in "".join(traceback.format_exception(raised.value))


def test_several_ledgers_need_postgres(tmp_path: Path):
    with pytest.raises(ConfigError, match="HITL_LEDGER_REPLICAS"):
        check_replicas(settings(tmp_path, ledger_replicas=2))


async def test_a_url_may_be_written_in_the_short_form():
    backend = PostgresBackend("postgres://me:hunter2@127.0.0.1:1/there?sslmode=disable")
    await backend.close()
