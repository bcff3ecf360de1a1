"""Two public generators make clients of docs/openapi.json, which pass a type checker and do the walk of docs/rest.md."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from claude_hitl_template.testing.threaded import Threaded

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests" / "generated_clients"
DOCUMENT = ROOT / "docs" / "openapi.json"


def run(*command: str | Path, cwd: Path, **more: str) -> str:
    environment = {**os.environ, **more}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def walk(served: Threaded, *command: str | Path, cwd: Path, **more: str) -> None:
    key = next(iter(served.service.keys.values()))
    said = run(*command, served.service.url, key, cwd=cwd, **more)
    assert said.splitlines()[-1] == "files batch.txt system.txt"
    for part in ("uname", "no dates, please", "as a slide"):
        assert part in said


@pytest.mark.slow
def test_a_python_client_does_the_walk(hot: Threaded, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "generator", cwd=tmp_path)
    generator = tmp_path / "generator" / "bin"
    pip = (generator / "python", "-m", "pip", "install", "--quiet", "--require-hashes", "--no-deps")
    run(*pip, "-r", HERE / "python.lock", cwd=tmp_path)
    command = (generator / "openapi-python-client", "generate", "--meta", "none", "--path", DOCUMENT)
    run(
        *command,
        "--output-path",
        "claude_hitl_client",
        cwd=tmp_path,
        PATH=f"{generator}:{os.environ['PATH']}",
    )
    shutil.copy(HERE / "walk.py", tmp_path)
    python = ("--pythonpath", generator / "python", "--pythonversion", "3.12")
    run(Path(sys.executable).parent / "pyright", *python, "walk.py", cwd=tmp_path)
    walk(hot, generator / "python", "walk.py", cwd=tmp_path)


@pytest.mark.slow
def test_a_typescript_client_does_the_walk(hot: Threaded, tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("needs npm")
    for name in ("package.json", "package-lock.json", "tsconfig.json", "walk.ts"):
        shutil.copy(HERE / name, tmp_path)
    run("npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", cwd=tmp_path)
    tools = tmp_path / "node_modules" / ".bin"
    options = (
        "--default-non-nullable=false",
        "--output",
        "api.d.ts",
    )  # fields with a default may be left out
    run(tools / "openapi-typescript", DOCUMENT, *options, cwd=tmp_path)
    run(tools / "tsc", cwd=tmp_path)
    walk(hot, "node", "walk.js", cwd=tmp_path)
