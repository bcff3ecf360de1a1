"""Every command of docs/rest.md, as it stands there, against the service in this process."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from claude_hitl_template.testing.threaded import Threaded
from tests.contract.test_mcp import Notes, calls, notes

__all__ = ["notes"]

GUIDE = (Path(__file__).parents[2] / "docs" / "rest.md").read_text()
MCP = "### With an MCP server\n"
TYPESCRIPT = "### With TypeScript\n"
CLIENTS = Path(__file__).parents[1] / "generated_clients"  # what npm installs

pytestmark = pytest.mark.skipif(
    any(shutil.which(program) is None for program in ("bash", "curl", "jq")), reason="needs bash, curl and jq"
)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run(served: Threaded, *command: str, **more: str) -> str:
    key = next(iter(served.service.keys.values()))
    environment = {**os.environ, "HITL_URL": served.service.url, "HITL_API_KEY": key, **more}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def bash(served: Threaded, *parts: str, **more: str) -> str:
    """What the commands print; the first that fails ends them, as a reader would stop there."""
    return run(served, "bash", "-c", "set -eu\n" + "\n".join(parts), **more)


def test_the_walk_creates_streams_allows_denies_edits_answers_and_reads_files(hot: Threaded) -> None:
    walk = GUIDE[GUIDE.index("## A walk with curl") : GUIDE.index(MCP)]
    steps = blocks(walk, "bash")
    assert len(steps) == 8
    said = bash(hot, *steps, 'echo; echo "session $session"')
    session = said.split()[-1]
    assert '"requires_action"' in said
    files = {
        path.name: path.read_text() for path in hot.service.workspace(session).iterdir() if path.is_file()
    }
    assert files.keys() == {"batch.txt", "system.txt"}
    assert files["system.txt"] == "Linux\n" or files["system.txt"] == "Darwin\n"
    assert "system.txt\n" in said
    assert files["batch.txt"] in said
    for part in ('"result":"allow"', '"deny_message":"no dates, please"', "as a slide"):
        assert part in said.replace('": ', '":')


def test_the_walk_with_an_mcp_server_has_its_tool_run_once_it_is_allowed(hot: Threaded, notes: Notes) -> None:
    part = GUIDE[GUIDE.index(MCP) : GUIDE.index(TYPESCRIPT)]
    (commands,) = blocks(part, "bash")
    prompt = json.dumps(calls(("add", {"text": "milk"}), ("add", {"text": "bread"})))
    # The offline model has no script for this message: it is given one.
    commands = commands.replace("<<JSON", "<<'JSON'").replace('"Note that we need milk"', prompt)
    commands = commands.replace("$MCP_URL", notes.url)
    define = blocks(GUIDE, "bash")[0].splitlines()[0]
    end = """until api "/sessions/$session" | jq -e '.stop_reason.type == "end_turn"' > /dev/null; do sleep 0.2; done"""
    said = bash(hot, define, commands, end)
    assert "mcp__notes__add" in said
    assert notes.added == ["milk", "bread"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")
def test_the_typescript_runs(hot: Threaded, tmp_path: Path) -> None:
    for name in ("package.json", "package-lock.json"):
        shutil.copy(CLIENTS / name, tmp_path)
    install = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
    subprocess.run(install, cwd=tmp_path, capture_output=True, check=True)
    (code,) = blocks(GUIDE, "ts")
    (tmp_path / "guide.mjs").write_text(code)  # it has no types, so it is JavaScript, too
    assert run(hot, "node", str(tmp_path / "guide.mjs")).splitlines()[-1] == "session.status_idle"
