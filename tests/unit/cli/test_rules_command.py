"""`hitl rules`: rules are read from a file, shown, guarded by their version, and tried on recorded calls."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from claude_hitl_template.cli.app import app
from claude_hitl_template.config.secret_files import hash_api_key
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.models import Agent, Environment
from claude_hitl_template.errors import ConfigError, HitlError, InvalidInput, Outdated
from claude_hitl_template.store.protocol import Call
from claude_hitl_template.testing.threaded import Threaded
from tests.unit.cli.conftest import FIRST

type Make = Callable[..., Settings]
RULES = """
rules:
  - pattern: Bash(git push:*)
    action: ask
    severity: high
    reason: It leaves the building.
    approvers: {groups: [release]}
    quorum: 2
    deadline_s: 600
    on_deadline: escalate
    escalate_to: {groups: [oncall]}
  - {pattern: "Bash(terraform apply:*)", action: deny}
"""


@pytest.fixture(autouse=True)
def first_key(here: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line has the first key."""
    monkeypatch.setenv("HITL_API_KEY", FIRST)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rules.yaml"
    path.write_text(RULES)
    return path


def run(*arguments: str) -> str:
    """Runs `hitl rules` and returns what it prints to stdout. Raises the command's errors."""
    result = CliRunner().invoke(app, ["rules", *arguments])
    if isinstance(result.exception, HitlError):
        raise result.exception
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines(keepends=True)
    return "".join(line for line in lines if "[info " not in line)  # the log of the service, in this process


async def _ask(served: Threaded, command: str) -> None:
    store = served.service.store
    first = await store.find_identity(hash_api_key(FIRST))
    assert first is not None
    session = await store.create_session(
        first.workspaces[0].id, agent=Agent(), environment=Environment(), title=None, metadata={}, initial=[]
    )
    await store.acquire(session.id, "owner", lease_s=600)
    given = {"command": command}
    call = Call(call_id="t1", tool_name="Bash", input=given, digest=digest(given), verdict="ask")
    await store.open_calls(session.id, 1, [], [call], cwd="/w", expires_at=None)


def test_rules_are_set_from_a_file_shown_and_read_again(file: Path, tmp_path: Path) -> None:
    said = run("set", str(file))
    assert "has 2 rules, version" in said
    shown = run("list")
    assert "2 of the group release" in shown
    assert "600 s, then the group oncall" in shown
    assert "everything else: left to the agent's policy" in shown
    again = tmp_path / "again.json"
    again.write_text(run("list", "--json"))
    assert json.loads(again.read_text())["rules"][1]["action"] == "deny"
    assert run("set", str(again)) == said, "the same rules again change nothing"


def test_a_file_that_is_wrong_is_named_with_its_line(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(RULES.replace("quorum: 2", "quorum: two"))
    with pytest.raises(ConfigError, match=r"wrong\.yaml, line 8: rules\.0\.quorum: "):
        run("set", str(wrong))
    with pytest.raises(ConfigError, match="cannot be read"):
        run("test", str(tmp_path / "none"))


def test_rules_that_someone_else_changed_are_not_replaced(file: Path, tmp_path: Path) -> None:
    run("set", str(file))
    other = tmp_path / "other.yaml"
    other.write_text("default: ask\n")
    with pytest.raises(Outdated, match="the current version is"):
        run("set", str(other), "--version", "0")
    with pytest.raises(InvalidInput, match="there is no workspace"):
        run("list", "--workspace", "none")


def test_recorded_calls_are_tried_on_a_changed_file(served: Threaded, tmp_path: Path) -> None:
    free = tmp_path / "free.yaml"
    free.write_text("")
    run("set", str(free))
    served.run(_ask(served, "make it"))
    served.run(_ask(served, "terraform apply x"))
    stricter = tmp_path / "stricter.yaml"
    stricter.write_text(RULES)
    said = run("test", str(stricter))
    assert "of 2 recorded calls 1 would be decided otherwise" in said
    assert "denied (the workspace's rule: Bash(terraform apply:*))" in said
    [one] = json.loads(run("test", str(stricter), "--json"))
    assert one["given"] == {"command": "terraform apply x"}
    assert run("test", str(free)) == "of 2 recorded calls 0 would be decided otherwise\n"


def test_the_example_of_the_guide_is_set_and_shown(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[3] / "docs" / "rules.md").read_text()
    file = tmp_path / "rules.yaml"
    file.write_text(guide.partition("```yaml\n")[2].partition("```")[0])
    assert "recorded calls" in run("test", str(file))
    run("set", str(file))
    shown = run("list")
    assert "2 of the group release, not who asked for the session" in shown
    assert "1800 s, then the group oncall" in shown
