"""`hitl image` reports problems before it builds or runs anything."""

from pathlib import Path

import pytest

from claude_hitl_template.cli.commands.image import local_name
from tests.commands import hitl


@pytest.fixture(autouse=True)
def no_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize("command", [("build",), ("push", "x:1"), ("verify",), ("prune",)])
def test_without_a_container_tool_each_command_says_what_to_install(command: tuple[str, ...]):
    result = hitl("image", *command)
    assert result.returncode == 1
    assert "Fix: apt install podman" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [(), ("nonsense",), ("push",), ("build", "--tool", "sh"), ("build", "--from-host", "--base", "base:1")],
)
def test_wrong_usage_is_2(arguments: tuple[str, ...]):
    assert hitl("image", *arguments).returncode == 2


@pytest.mark.parametrize(
    ("tag", "shown"),
    [
        ("worker:1", "localhost/worker:1"),
        ("team/worker:1", "localhost/team/worker:1"),
        ("localhost/worker:1", "localhost/worker:1"),
        ("127.0.0.1:5000/worker:1", "127.0.0.1:5000/worker:1"),
        ("registry.example.org/worker:1", "registry.example.org/worker:1"),
    ],
)
def test_what_is_printed_for_the_settings_is_how_podman_names_it(tag: str, shown: str):
    assert local_name(tag) == shown
