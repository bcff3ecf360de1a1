"""The commands of README and quickstart on a running service. The first ones are in acceptance/test_new_service.py."""

import re
import shlex
from pathlib import Path

import pytest

from tests.integration.harness import Service

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def test_the_demo_that_denies_tells_the_model_and_leaves_no_file(service: Service):
    done = service.hitl("demo", "--answer", "deny", "--deny-message", "not in this house")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The result was: Denied by a human: not in this house" in done.stdout.replace("\n", " ")
    assert not (service.newest_workspace() / "hello.txt").exists()


@pytest.mark.parametrize(
    "prompt", ["Do three things at once", "Ask me a question", "Make a plan first", "Let a subagent do it"]
)
def test_the_demo_goes_through_every_kind_of_approval(service: Service, prompt: str):
    done = service.hitl("demo", "--answer", "allow", "--prompt", prompt)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_second_up_changes_nothing(service: Service):
    before = service.head().pid
    service.up()
    assert service.head().pid == before


def test_the_quickstarts_commands_run_as_they_stand(service: Service):
    text = (ROOT / "docs" / "quickstart.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    assert lines
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "./hitl"
        done = service.hitl(*arguments)
        assert done.returncode == 0, line + done.stdout + done.stderr


def test_a_backup_is_made_and_restored(service: Service, tmp_path: Path):
    file = tmp_path / "FILE"
    made = service.hitl("backup", str(file))
    assert made.returncode == 0, made.stdout + made.stderr
    other = Service(tmp_path)
    restored = other.hitl("restore", str(file))
    assert restored.returncode == 0, restored.stdout + restored.stderr
    assert restored.stdout.partition(" sessions")[0] == made.stdout.partition(" sessions")[0]
