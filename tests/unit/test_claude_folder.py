"""The `.claude` folder of this repository: its commands exist, and it grants no blanket permission and leaks nothing."""

import json
import re
from pathlib import Path

import pytest

from claude_hitl_template.cli.app import ENTRIES

FOLDER = Path(__file__).parents[2] / ".claude"
COMMANDS = sorted((FOLDER / "commands").glob("*.md"))
KNOWN = set(ENTRIES)


def test_the_promised_commands_are_there() -> None:
    assert [path.stem for path in COMMANDS] == ["cc-deploy", "cc-setup", "cc-shutdown"]


@pytest.mark.parametrize("path", [*COMMANDS, FOLDER / "CLAUDE.md"], ids=lambda path: path.stem)
def test_each_calls_only_hitl_commands_that_exist(path: Path) -> None:
    called = re.findall(r"\./hitl ([a-z][a-z-]*)", path.read_text())
    assert called
    assert set(called) <= KNOWN


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_each_says_what_it_does_and_takes_a_profile(path: Path) -> None:
    _, head, body = path.read_text().split("---\n", 2)
    assert "description: " in head
    assert "$ARGUMENTS" in body


def test_no_permission_is_a_blanket_one_and_nothing_that_changes_is_allowed_unasked() -> None:
    permissions = json.loads((FOLDER / "settings.json").read_text())["permissions"]
    assert set(permissions["allow"]) == {"Bash(./hitl status)", "Bash(./hitl doctor)"}
    assert "defaultMode" not in permissions
    for rule in ("Read(./.env)", "Read(./profiles/*.env)", "Bash(./hitl approvals allow:*)"):
        assert rule in permissions["deny"]
