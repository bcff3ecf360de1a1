"""launch.sh: what reaches the agent's process."""

import subprocess
from pathlib import Path

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
