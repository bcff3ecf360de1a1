"""`hitl image` as it is run: what is wrong is said before anything is built or run."""

import subprocess
import sys

import pytest

from claude_hitl_template.cli.image import local_name


def image(*arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "claude_hitl_template.cli", "image", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, env={"PATH": path}
    )


@pytest.mark.parametrize("command", [("build",), ("push", "x:1"), ("verify",), ("prune",)])
def test_without_a_container_tool_each_command_says_what_to_install(tmp_path, command: tuple[str, ...]):
    result = image(*command, path=str(tmp_path))
    assert result.returncode == 1
    assert "Mend: apt install podman" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [(), ("nonsense",), ("push",), ("build", "--tool", "sh"), ("build", "--from-host", "--base", "base:1")],
)
def test_wrong_usage_is_2(tmp_path, arguments: tuple[str, ...]):
    assert image(*arguments, path=str(tmp_path)).returncode == 2


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
