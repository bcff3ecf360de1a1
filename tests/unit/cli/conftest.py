"""Fixtures: a small service on loopback that gives the test's answers, and settings with their own folder."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from claude_hitl_template.cli.commands import development, workspaces
from claude_hitl_template.cli.host.ports import free_ports
from claude_hitl_template.config.secret_files import prepare
from claude_hitl_template.config.settings import Settings, variable
from claude_hitl_template.testing.local_service import OPERATOR_KEY
from claude_hitl_template.testing.threaded import Threaded, serve_in_thread
from tests.serving import loopback

FIRST = "key-of-the-command-line"


@pytest.fixture
def answering() -> Generator[Callable[..., str]]:
    """Starts services that answer every request with a status and the content for its path; returns their addresses."""
    with ExitStack() as open_ones:

        def make(status: int, bodies: Mapping[str, object] | None = None) -> str:
            app = FastAPI()

            @app.api_route("/{path:path}", methods=["GET", "HEAD"])
            def answer(path: str) -> JSONResponse:
                return JSONResponse((bodies or {}).get(f"/{path}", {}), status)

            return open_ones.enter_context(loopback(app))

        yield make


@pytest.fixture
def free_port() -> int:
    return free_ports(1)[0]


@pytest.fixture
def make_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """Builds settings as `hitl` reads them, with only these values in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(variable(name), raising=False)

    def make(**values: object) -> Settings:
        for name, value in {"data_dir": tmp_path / "data", **values}.items():
            monkeypatch.setenv(variable(name), str(value))
        return Settings.load()

    return make


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own project folder, so that no other run loses its caches."""
    (tmp_path / "project" / ".ruff_cache").mkdir(parents=True)
    monkeypatch.setattr(development, "ROOT", tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Threaded]:
    """A service that drives no session, whose first key is FIRST."""
    folder = tmp_path_factory.mktemp("served")
    with serve_in_thread(folder, keys={"first key": FIRST}, backing="memory", driving=False) as one:
        yield one


@pytest.fixture
def here(
    served: Threaded, make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> Settings:
    """Settings of the machine on which `served` runs."""
    settings = make_settings(serve_port=served.service.url.rpartition(":")[2].partition("/")[0])
    prepare(settings)

    def key(_settings: Settings) -> str:
        return OPERATOR_KEY

    monkeypatch.setattr(workspaces, "operator_key", key)
    return settings
