"""The package works without a checkout: built, installed into an empty environment, started from an empty folder."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config

from claude_hitl_template import __version__, code_version
from claude_hitl_template.store.sqlite import sqlite_url
from tests.integration.harness import Service

ROOT = Path(__file__).parents[2]


def run(*command: str | Path) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install(python: Path, *arguments: str | Path) -> None:
    uv = shutil.which("uv")
    pip = (uv, "pip", "install", "--python", python) if uv else (python, "-m", "pip", "install")
    run(*pip, "--quiet", "--no-deps", *arguments)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel, and with what the lock has."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "--directory", folder, "--target", "wheel")
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    install(python, "--require-hashes", "-r", ROOT / "requirements.lock")
    install(python, wheel)
    run(python, "-m", "pip", "check")  # the lock has all that the wheel asks for
    return python.parent


def migrate_to(revision: str, database: Path) -> None:
    config = Config()
    config.set_main_option("script_location", str(ROOT / "claude_hitl_template" / "store" / "migrations"))
    config.attributes["url"] = sqlite_url(database)
    command.upgrade(config, revision)


@pytest.mark.slow
def test_the_demo_runs_from_an_empty_folder_with_its_data_in_the_users(environment: Path, tmp_path: Path):
    home = {"HOME": str(tmp_path / "home"), "XDG_DATA_HOME": str(tmp_path / "share")}
    service = Service(tmp_path, home, (str(environment / "hitl"),))
    del service.environment["HITL_DATA_DIR"]
    version = service.hitl("--version").stdout
    assert version == f"claude-hitl {__version__}, code {code_version()}\n"
    try:
        demo = service.hitl("demo", "--answer", "allow")
        assert demo.returncode == 0, demo.stdout + demo.stderr
        assert "Next       hitl demo" in service.hitl("up").stdout
        (written,) = (tmp_path / "share").rglob("workspaces/*/hello.txt")
        assert written.read_text().startswith("Hello!")
        assert service.hitl("upgrade", "--check").returncode == 0
        left_out = service.hitl("deploy")
        assert left_out.returncode == 1
        assert re.match(r"error: hitl deploy works on the files of a checkout", left_out.stderr)
    finally:
        assert service.hitl("down").returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["share"]  # nothing in the folder that it was started in


@pytest.mark.slow
def test_an_older_data_folder_is_upgraded(tmp_path: Path):
    service = Service(tmp_path)
    (tmp_path / "data").mkdir()
    migrate_to("0001", tmp_path / "data" / "hitl.sqlite3")
    assert service.hitl("upgrade", "--check").returncode == 1
    try:
        done = service.hitl("upgrade")
        assert done.returncode == 0, done.stdout + done.stderr
        check = service.hitl("upgrade", "--check")
        assert check.returncode == 0, check.stdout
        assert "the same" in check.stdout
    finally:
        service.down()
