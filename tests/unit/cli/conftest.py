"""A small service on loopback that says what a test tells it to, and settings of a folder of one's own."""

import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI

from claude_hitl_template.settings import Settings, variable


@contextmanager
def loopback(app: FastAPI) -> Generator[str]:
    """`app` on a free port of 127.0.0.1; yields its address, and leaves no thread behind."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def make_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """Settings as `hitl` reads them, with these values in the environment and nothing else of ours."""
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(variable(name), raising=False)

    def make(**values: object) -> Settings:
        for name, value in {"data_dir": tmp_path / "data", **values}.items():
            monkeypatch.setenv(variable(name), str(value))
        return Settings.load()

    return make
