"""The Postgres that `./hitl up --postgres` makes: reached with a password only, and there again after a kill."""

import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
from pydantic import SecretStr

from claude_hitl_template.cli.commands.doctor import database_check
from claude_hitl_template.cli.host import postgres
from claude_hitl_template.config.secret_files import prepare
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.store.connect import check_database, store_url
from tests.postgres import require


@pytest.fixture
def settings() -> Iterator[Settings]:
    require()
    folder = Path(tempfile.mkdtemp(prefix="hitl-postgres-"))
    folder.chmod(0o711)
    made = Settings.load().model_copy(update={"data_dir": folder / "data", "database_url": None})
    prepare(made)
    yield made
    postgres.local(made).stop("immediate")
    shutil.rmtree(folder)


@pytest.mark.slow
def test_it_is_made_when_asked_for_and_used_from_then_on(settings: Settings):
    assert postgres.start_missing(settings, make=False) == []
    assert database_check(settings).found.startswith("SQLite")
    assert postgres.start_missing(settings, make=True) == ["started Postgres"]
    assert postgres.start_missing(settings, make=True) == []
    prepare(settings)  # at the next start, without its option
    assert store_url(settings) == postgres.local(settings).url
    found = check_database(settings)
    assert (found.problem, "version" in found.place) == (None, True)
    assert postgres.local(settings).url.split(":")[2].split("@")[0] not in found.place
    assert postgres.local(settings).stop()
    assert not postgres.local(settings).stop()
    check = database_check(settings)
    assert (check.level, check.fix) == ("warning", "./hitl up")
    assert postgres.start_missing(settings, make=False) == ["started Postgres"]


def test_nobody_gets_in_without_the_password_and_the_files_are_closed(settings: Settings):
    postgres.start_missing(settings, make=True)
    url = postgres.local(settings).url
    password = url.split(":")[2].split("@")[0]
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(url.replace(password, "guess"))
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(url.replace(f":{password}", ""))
    assert stat.S_IMODE(settings.postgres_dir.stat().st_mode) == 0o700
    for secret in ("database-url", "postgres-password"):
        assert stat.S_IMODE((settings.secrets_dir / secret).stat().st_mode) == 0o600
    server = psutil.Process(postgres.local(settings).pid() or 0)
    assert password not in " ".join(server.cmdline())
    assert server.uids().real != 0
    own = [c for c in psutil.net_connections("tcp") if c.pid == server.pid]
    assert {c.laddr[0] for c in own if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}


@pytest.mark.slow
def test_what_was_kept_is_there_after_the_server_was_killed(settings: Settings):
    postgres.start_missing(settings, make=True)
    with psycopg.connect(postgres.local(settings).url) as connection:
        connection.execute("create table kept as select 7 as n")
    os.kill(postgres.local(settings).pid() or 0, signal.SIGKILL)
    psutil.wait_procs(
        [p for p in psutil.process_iter() if p.pid == postgres.local(settings).pid()], timeout=10
    )
    assert postgres.start_missing(settings, make=False) == ["started Postgres"]
    with psycopg.connect(postgres.local(settings).url) as connection:
        assert connection.execute("select n from kept").fetchone() == (7,)


def test_a_postgres_of_ones_own_and_one_of_ours_are_not_mixed(settings: Settings):
    named = settings.model_copy(update={"database_url": SecretStr("postgresql://u:hunter2@127.0.0.1:1/d")})
    with pytest.raises(ConfigError, match="DATABASE_URL"):
        postgres.start_missing(named, make=True)
    check = database_check(named)
    assert check.level == "wrong"
    assert "hunter2" not in check.found


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs it as somebody else")
def test_a_folder_that_the_servers_user_cannot_reach_is_named_with_what_mends_it(settings: Settings):
    settings.data_dir.parent.chmod(0o700)
    with pytest.raises(ConfigError, match="cannot reach") as raised:
        postgres.start_missing(settings, make=True)
    assert "HITL_DATA_DIR" in raised.value.fix


def test_what_is_not_installed_is_named_with_what_installs_it():
    with pytest.raises(ConfigError, match="no-such-program") as raised:
        postgres.find_program("no-such-program")
    assert "apt install postgresql" in raised.value.fix
