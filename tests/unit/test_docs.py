"""What the documents say can be followed: links lead somewhere, and commands exist."""

import re
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from claude_hitl_template import __version__
from claude_hitl_template.cli.app import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = set(get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere_and_commands_exist(document: Path):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (document.parent / target).exists(), target
    for command in re.findall(r"\./hitl ([a-z]+)", text):
        assert command in COMMANDS, command


def test_each_line_of_the_justfile_calls_a_command_that_exists():
    called = re.findall(r"^    \./hitl ([a-z]+)", (ROOT / "justfile").read_text(), re.MULTILINE)
    assert len(called) == 8
    assert set(called) <= COMMANDS


def test_the_version_is_the_projects():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
