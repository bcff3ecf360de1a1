"""launch.sh: what reaches the agent's process."""

import subprocess
from pathlib import Path

import pytest

from claude_hitl_template.claude.cli import LAUNCHER


def launched(environment: dict[str, str], *args: str) -> dict[str, str]:
    done = subprocess.run([LAUNCHER, *args], env=environment, capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def test_only_what_the_agent_needs_reaches_it():
    seen = launched({
        "HITL_CLI": "/usr/bin/env", "PATH": "/usr/bin:/bin", "HOME": "/home/x", "LC_ALL": "C.UTF-8",
        "ANTHROPIC_API_KEY": "a token", "ANTHROPIC_BASE_URL": "http://x", "CLAUDE_CONFIG_DIR": "/c",
        "AWS_SECRET_ACCESS_KEY": "s", "DATABASE_URL": "d", "RAY_AUTH_TOKEN": "r", "HITL_API_KEY": "k",
        "ANTHROPIC_AUTH_TOKEN": "t",
    })  # fmt: skip
    hidden = {
        "AWS_SECRET_ACCESS_KEY",
        "DATABASE_URL",
        "RAY_AUTH_TOKEN",
        "HITL_API_KEY",
        "ANTHROPIC_AUTH_TOKEN",
    }
    assert not hidden & seen.keys()
    assert {
        "PATH",
        "HOME",
        "LC_ALL",
        "ANTHROPIC_API_KEY",
        "ANTHROPIC_BASE_URL",
        "CLAUDE_CONFIG_DIR",
    } <= seen.keys()


def test_commands_are_not_taken_for_a_remote_shells(tmp_path: Path):
    """bash reads ~/.bashrc before each command when SHLVL is missing and its input is a socket, as the CLI's is."""
    assert launched({"HITL_CLI": "/usr/bin/env", "PATH": "/usr/bin:/bin"})["SHLVL"] == "1"


def test_the_user_layer_is_laid_over_the_config_folder_and_hides_nothing_of_it(tmp_path: Path):
    layer, config = tmp_path / "user layer", tmp_path / "a config"
    (layer / "commands").mkdir(parents=True)
    (layer / "commands" / "hello.md").write_text("hello")
    (layer / "settings.json").write_text("{}")
    config.mkdir()
    (config / "settings.json").write_text("kept")
    environment = {
        "HITL_CLI": "/usr/bin/env", "PATH": "/usr/bin:/bin", "CLAUDE_CONFIG_DIR": str(config), "HITL_USER_LAYER": str(layer)
    }  # fmt: skip
    for _ in range(2):  # again over the same folder
        assert "HITL_USER_LAYER" not in launched(environment)
    assert (config / "commands/hello.md").read_text() == "hello"
    assert (config / "settings.json").read_text() == "kept"


def test_an_empty_user_layer_leaves_the_config_folder_as_it_is(tmp_path: Path):
    (tmp_path / "layer").mkdir()
    (tmp_path / "config").mkdir()
    launched({
        "HITL_CLI": "/usr/bin/env", "PATH": "/usr/bin:/bin", "CLAUDE_CONFIG_DIR": str(tmp_path / "config"),
        "HITL_USER_LAYER": str(tmp_path / "layer"),
    })  # fmt: skip
    assert list((tmp_path / "config").iterdir()) == []


def test_a_user_layer_that_cannot_be_laid_starts_no_cli(tmp_path: Path):
    (tmp_path / "layer").mkdir()
    (tmp_path / "layer/CLAUDE.md").write_text("x")
    with pytest.raises(subprocess.CalledProcessError):
        launched({
            "HITL_CLI": "/usr/bin/env", "PATH": "/usr/bin:/bin", "CLAUDE_CONFIG_DIR": str(tmp_path / "nowhere"),
            "HITL_USER_LAYER": str(tmp_path / "layer"),
        })  # fmt: skip
