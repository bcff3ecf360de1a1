"""Each problem of the panel is reported with its fix, and only the user can read the file with its secrets."""

import json
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from claude_hitl_template.cli.host import panel
from claude_hitl_template.cli.host.panel import Panel, check_panel, routes_url, running, write_settings
from claude_hitl_template.cli.host.processes import panel_environment, temp_dir
from claude_hitl_template.config.secret_files import PANEL_PROOF, prepare, prepare_panel, read_panel_login
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError, Unauthorized, Unavailable
from tests.serving import loopback

type Make = Callable[..., Settings]


@contextmanager
def stand_in(
    settings: Settings, *arguments: str, module: str = "kodosumi.cli"
) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a process with the name of the spooler or the panel of our cluster."""
    code = ["-c", "input()", "-m", module, *arguments]
    ours = {"HITL_CLUSTER": str(temp_dir(settings)), "HITL_DATA_DIR": str(settings.data_dir)}
    marked = {**os.environ, **ours}
    process = subprocess.Popen([sys.executable, *code], env=marked, stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        process.communicate(b"\n")


def kodosumi(*, spooler: int | None, entries: list[str], password: str) -> FastAPI:
    """A panel with the routes that `hitl` uses."""
    app = FastAPI()
    listed = [{"url": f"/-/{base}/start", "base_url": f"{base}/start"} for base in entries]

    @app.post("/api/login")
    async def login(request: Request) -> JSONResponse:
        assert request.headers[PANEL_PROOF]  # what others try does not hold this login up
        if (await request.json()) != {"name": "admin", "password": password}:
            return JSONResponse({"detail": "Invalid name or password"}, 401)
        return JSONResponse({"KODOSUMI_API_KEY": "token"})

    @app.get("/health")
    def health(request: Request) -> dict[str, object]:
        assert request.headers["kodosumi_api_key"] == "token"
        found = {"pid": spooler, "active": 3} if spooler else {"error": "Spooler not found"}
        return {"spooler_status": found}

    @app.get("/flow")
    def flow() -> dict[str, object]:
        return {"items": listed, "offset": None}

    @app.post("/flow/register", status_code=201)
    async def register(request: Request) -> list[dict[str, str]]:
        assert (await request.json())["url"].endswith("/-/routes")
        return listed

    return app


@pytest.fixture
def prepared(make_settings: Make, free_port: int) -> Settings:
    settings = make_settings(panel_port=free_port)
    prepare(settings)
    prepare_panel(settings)
    return settings


def password_of(settings: Settings) -> str:
    login = read_panel_login(settings)
    assert login
    return login[1]


@contextmanager
def answering(settings: Settings, make: Make, **told: object) -> Iterator[Settings]:
    """`settings` with the port of a panel that gives this answer."""
    said = {"spooler": None, "entries": [settings.base_url], "password": password_of(settings), **told}
    with loopback(kodosumi(**said)) as url:  # pyright: ignore[reportArgumentType]
        yield make(panel_port=url.rpartition(":")[2])


def test_secrets_of_the_panel_are_made_once_and_for_their_owner_only(prepared: Settings) -> None:
    before = read_panel_login(prepared)
    prepare_panel(prepared)
    assert read_panel_login(prepared) == before
    assert before
    assert all(len(secret) >= 20 for secret in before)
    write_settings(prepared)
    kept = [prepared.panel_dir / ".env", *prepared.secrets_dir.glob("panel-*")]
    assert len(kept) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept} == {0o600}
    assert stat.S_IMODE(prepared.panel_dir.stat().st_mode) == 0o700


def test_kodosumi_reads_its_settings_from_the_file_and_keeps_its_files_below_ours(prepared: Settings) -> None:
    write_settings(prepared)
    code = (
        "import json, os; from kodosumi.config import Settings; "
        "print(json.dumps([Settings().model_dump(mode='json'), sorted(os.environ)]))"
    )
    environment = {**panel_environment(prepared), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=prepared.panel_dir, env=environment, capture_output=True, check=True)
    found, variables = json.loads(done.stdout)
    assert (found["SECRET_KEY"], found["ADMIN_PASSWORD"]) == read_panel_login(prepared)
    for name in ("EXEC_DIR", "UPLOAD_DIR", "SPOOLER_LOG_FILE", "APP_LOG_FILE", "YAML_BASE"):
        assert Path(found[name]).is_relative_to(prepared.data_dir)
    assert str(prepared.panel_dir) in found["ADMIN_DATABASE"]
    assert found["CORS_ORIGINS"] == [prepared.panel_url, f"http://localhost:{prepared.panel_port}"]
    assert found["CHUNK_SIZE"] <= 1024 * 1024
    assert not Path(found["YAML_BASE"]).exists()  # a redeploy from the panel would delete the service
    assert not [name for name in variables if "KEY" in name or "SECRET" in name]


@pytest.mark.parametrize(("host", "listens"), [("127.0.0.1", "127.0.0.1"), ("10.0.0.7", "0.0.0.0")])
def test_where_others_reach_it_the_panel_answers_to_localhost_too(
    make_settings: Make, host: str, listens: str
) -> None:
    """It uses the name in the browser's address as its own, and forwarded ports are the browser's localhost."""
    settings = make_settings(host=host)
    prepare(settings)
    prepare_panel(settings)
    write_settings(settings)
    assert f"KODO_APP_SERVER='http://{listens}:" in (settings.panel_dir / ".env").read_text()


def test_a_model_key_reaches_neither_spooler_nor_panel(
    prepared: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-x")
    (prepared.data_dir.parent / ".env").write_text("ANTHROPIC_API_KEY=sk-ant-y\n")
    write_settings(prepared)
    code = "import kodosumi.config, os; print(os.environ.get('ANTHROPIC_API_KEY'))"
    environment = {**panel_environment(prepared), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=prepared.panel_dir, env=environment, capture_output=True, check=True)
    assert done.stdout.decode().strip() == "None"


def test_what_does_not_run_is_named(prepared: Settings) -> None:
    assert (check_panel(prepared).problem, check_panel(prepared).fix.partition(";")[0]) == (
        "the spooler does not run",
        "./hitl up",
    )
    with stand_in(prepared, module=panel.SPOOLER) as spooler:
        found = check_panel(prepared)
    assert found.spooler == spooler.pid
    assert found.problem == "the panel does not run"


def test_only_processes_of_our_cluster_are_ours(
    prepared: Settings, make_settings: Make, tmp_path: Path
) -> None:
    other = make_settings(data_dir=tmp_path / "other")
    with (
        stand_in(other, module=panel.SPOOLER),
        stand_in(prepared, "--register", "x", module=panel.SERVER) as served,
    ):
        assert {name: process.pid for name, process in running(prepared).items()} == {"panel": served.pid}


def test_a_panel_of_an_earlier_version_that_nothing_protects_is_replaced(
    prepared: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def start(_settings: Settings, name: str) -> None:
        started.append(name)

    monkeypatch.setattr(panel, "_start", start)
    with stand_in(prepared, "spool", "--block"), stand_in(prepared, "serve", "--register", "x") as before:
        assert check_panel(prepared).problem == "the panel does not run"
        assert panel.start_missing(prepared) == ["panel"]
        assert before.poll() is not None
    assert started == ["panel"]


def test_the_panel_has_the_names_that_lead_to_it_and_no_other(make_settings: Make) -> None:
    """It does not answer under any other name, which an attacker may have chosen."""

    def origins(**values: object) -> list[str]:
        settings = make_settings(panel_port=3370, **values)
        prepare(settings)
        prepare_panel(settings)
        write_settings(settings)
        (line,) = re.findall("KODO_CORS_ORIGINS='(.*)'", (settings.panel_dir / ".env").read_text())
        return json.loads(line)

    own = ["http://127.0.0.1:3370", "http://localhost:3370"]
    assert origins() == own
    named = origins(panel_hosts=" Panel.example, proxy.example:80 ")
    assert named == [*own, "http://panel.example:3370", "http://proxy.example:80"]
    assert f"http://{socket.gethostname().lower()}:3370" in origins(host="10.0.0.7")
    assert "http://10.0.0.7:3370" in origins(host="10.0.0.7")


def test_a_panel_that_is_well_has_no_problem(prepared: Settings, make_settings: Make) -> None:
    with (
        stand_in(prepared, "spool", "--block") as spooler,
        stand_in(prepared, "--register", "x", module=panel.SERVER),
    ):
        with answering(prepared, make_settings, spooler=spooler.pid) as settings:
            found = check_panel(settings)
        assert (found.problem, found.flows) == (None, 3)
        with answering(prepared, make_settings) as settings:
            assert check_panel(settings).problem == "the panel does not find the spooler"
        with answering(
            prepared, make_settings, spooler=spooler.pid, entries=["http://other/app"]
        ) as settings:
            assert routes_url(settings) in str(check_panel(settings).problem)
        with answering(prepared, make_settings, password="changed") as settings:
            assert "it was changed there" in str(check_panel(settings).problem)
            assert (
                check_panel(settings).fix
                == f"write its password into {settings.secrets_dir / 'panel-password'}"
            )


def test_a_panel_that_does_not_answer_says_where(make_settings: Make) -> None:
    with pytest.raises(Unavailable, match="does not answer at http"):
        Panel(make_settings(panel_port=1)).health()


def test_starting_ends_at_once_when_the_admins_password_was_changed(
    prepared: Settings, make_settings: Make
) -> None:
    with answering(prepared, make_settings, password="changed") as settings, pytest.raises(Unauthorized):
        panel.wait(settings)


def test_the_panel_is_told_to_read_our_entries_again(prepared: Settings, make_settings: Make) -> None:
    with answering(prepared, make_settings, entries=["http://other/app", prepared.base_url]) as settings:
        assert Panel(settings).register() == [f"/-/{prepared.base_url}/start"]


def test_a_panel_without_secrets_is_not_started(make_settings: Make) -> None:
    settings = make_settings()
    prepare(settings)
    with pytest.raises(ConfigError, match="no secrets"):
        panel.start_missing(settings)


@pytest.mark.usefixtures("prepared")
def test_a_panel_whose_port_somebody_took_is_not_waited_for(make_settings: Make) -> None:
    with loopback(FastAPI()) as url:
        prepared = make_settings(panel_port=url.rpartition(":")[2])
        with pytest.raises(ConfigError) as raised:
            panel.wait(prepared)
    assert f"port {prepared.panel_port} (HITL_PANEL_PORT) is taken by" in str(raised.value)
    assert "HITL_PANEL_PORT" in raised.value.fix
    assert not running(prepared)
