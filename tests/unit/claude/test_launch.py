"""launch.sh and launch.py: the environment and arguments that reach the agent's process."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from claude_hitl_template.claude.cli_engine import CliConfig, launch_environment
from claude_hitl_template.claude.sandbox import LAUNCHER, launch_plan

ENV = Path("/usr/bin/env")


def launched(environment: dict[str, str], *args: str, shell: str = "sh") -> dict[str, str]:
    command = [shell, LAUNCHER, *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def plan(*keep: str, **more: Any) -> dict[str, str]:
    return {**OF_THE_SYSTEM, **launch_plan(ENV, keep, **more)}


OF_THE_SYSTEM = {"PATH": "/usr/bin:/bin", "HOME": "/home/x", "LC_ALL": "C.UTF-8", "TERM": "xterm"}
OF_THE_OPERATOR = {
    "AWS_SECRET_ACCESS_KEY": "s", "DATABASE_URL": "d", "RAY_AUTH_TOKEN": "r", "HITL_API_KEY": "k",
    "ANTHROPIC_AUTH_TOKEN": "t", "ANTHROPIC_CUSTOM_HEADERS": "x: y", "ANTHROPIC_BEDROCK_BASE_URL": "http://b",
    "CLAUDE_CODE_USE_BEDROCK": "1", "CLAUDE_CODE_USE_VERTEX": "1", "CLAUDE_CODE_SHELL_PREFIX": "/bin/other",
    "CLAUDE_CODE_OAUTH_TOKEN": "o", "CLAUDE_ENV_FILE": "/e", "CLAUDE_CODE_SHELL": "/bin/zsh", "CLAUDECODE": "1",
    "DISABLE_PROMPT_CACHING": "1", "DISABLE_AUTOUPDATER": "1", "MAX_THINKING_TOKENS": "1", "BASH_ENV": "/e",
    "ENV": "/e", "LD_PRELOAD": "", "NODE_OPTIONS": "--x", "HTTPS_PROXY": "http://p", "GIT_SSH_COMMAND": "g",
    "MANY_LINES": "one\nCLAUDE_CODE_USE_BEDROCK=1\ntwo", "odd-name": "o", "BASH_FUNC_ls%%": "() { echo other; }",
}  # fmt: skip


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_the_agent_s_environment_is_a_closed_list(tmp_path: Path, shell: str):
    """No variable of the operator's shell that the CLI would use is in it; where the service sets the same name, its
    value is."""
    config = CliConfig(tmp_path, tmp_path / "config", "http://model", "a token", cli_path=ENV, sandbox=None)
    ours = launch_environment(config)
    said_before = dict.fromkeys(ours, "of the operator")
    seen = launched(said_before | OF_THE_SYSTEM | OF_THE_OPERATOR | ours, shell=shell)
    closed = ours.keys() - {"HITL_LAUNCH", "HITL_PYTHON"}
    assert seen.keys() - {"_", "OLDPWD", "PWD", "SHLVL"} == closed | OF_THE_SYSTEM.keys()
    assert {name: seen[name] for name in closed} == {name: ours[name] for name in closed}
    assert {name: seen[name] for name in OF_THE_SYSTEM} == OF_THE_SYSTEM


def test_what_is_asked_for_its_version_gets_nothing_of_the_operator_either():
    seen = launched({**OF_THE_OPERATOR, **plan()})
    assert not seen.keys() & OF_THE_OPERATOR.keys()


def test_commands_are_not_taken_for_a_remote_shells():
    """bash reads ~/.bashrc before each command if SHLVL is missing and its input is a socket, as with the CLI."""
    assert "SHLVL" in launched(plan())


def test_the_user_layer_is_laid_over_the_config_folder_and_hides_nothing_of_it(tmp_path: Path):
    layer, config = tmp_path / "user layer", tmp_path / "a config"
    (layer / "commands").mkdir(parents=True)
    (layer / "commands" / "hello.md").write_text("hello")
    (layer / "settings.json").write_text("{}")
    config.mkdir()
    (config / "settings.json").write_text("kept")
    environment = {**plan("CLAUDE_CONFIG_DIR", user_layer=layer), "CLAUDE_CONFIG_DIR": str(config)}
    for _ in range(2):  # again over the same folder
        launched(environment)
    assert (config / "commands/hello.md").read_text() == "hello"
    assert (config / "settings.json").read_text() == "kept"


def test_an_empty_user_layer_leaves_the_config_folder_as_it_is(tmp_path: Path):
    layer, config = tmp_path / "layer", tmp_path / "config"
    layer.mkdir()
    config.mkdir()
    launched({**plan("CLAUDE_CONFIG_DIR", user_layer=layer), "CLAUDE_CONFIG_DIR": str(config)})
    assert os.listdir(config) == []


def test_a_user_layer_that_cannot_be_laid_starts_no_cli(tmp_path: Path):
    (tmp_path / "layer").mkdir()
    (tmp_path / "layer/CLAUDE.md").write_text("x")
    nowhere = {"CLAUDE_CONFIG_DIR": str(tmp_path / "nowhere")}
    with pytest.raises(subprocess.CalledProcessError):
        launched({**plan("CLAUDE_CONFIG_DIR", user_layer=tmp_path / "layer"), **nowhere})
