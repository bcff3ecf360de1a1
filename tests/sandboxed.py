"""Runs one command in a real sandbox, in the scope of a shell command and without the CLI, to test the sandbox itself."""

import os
import socket
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from claude_hitl_template.claude import sandbox
from claude_hitl_template.claude.injection import Injector
from claude_hitl_template.claude.limits import ControlGroups
from claude_hitl_template.claude.sandbox import SandboxConfig

SHELL = Path("/bin/sh")


@contextmanager
def sandboxed(folder: Path, command: str, config: SandboxConfig) -> "Generator[subprocess.Popen[str]]":
    """Yields the running sandbox, and ends it afterwards. All its files are in `folder`; its workspace is `folder /
    "workspace"`."""
    workspace, groups = folder / "workspace", ControlGroups()
    workspace.mkdir(parents=True, exist_ok=True)
    sandbox.give(workspace)
    places = sandbox.make_sandbox_paths(folder / "run", workspace, SHELL)
    Injector(config.credentials, places.run).make()
    (folder / "config").mkdir()
    inside = {**sandbox.environment_of(config), **sandbox.JAVASCRIPT}
    plan = sandbox.plan_of(config, places, groups.make(config.limits))
    environment = {
        **os.environ,
        **inside,
        **sandbox.launch_plan(SHELL, ["CLAUDE_CONFIG_DIR", *inside], sandbox=plan),
        "CLAUDE_CONFIG_DIR": str(folder / "config"),
    }
    with socket.socket(socket.AF_UNIX) as owner:
        sandbox.bind(owner, places.hand_over)
        running = subprocess.Popen(
            [sandbox.LAUNCHER, "-c", f'exec {sandbox.OWN}/scope "$0"', command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield running
        finally:
            running.kill()
            running.communicate()
            groups.remove()


def run_in_sandbox(folder: Path, command: str, config: SandboxConfig | None = None) -> str:
    """Runs a command and returns its output."""
    with sandboxed(folder, command, config or SandboxConfig()) as running:
        return running.communicate(timeout=60)[0]
