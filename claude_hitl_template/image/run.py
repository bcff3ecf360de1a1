"""Runs the programs that an image is made with: argument lists only, never a shell."""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from claude_hitl_template.errors import ConfigError

LAST_LINES = 15


def run(
    command: Sequence[str | Path],
    fix: str,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
) -> str:
    """What it printed on standard output. Raises ConfigError with its last words where it fails or is not there."""
    try:
        result = subprocess.run(  # noqa: S603
            command,
            cwd=cwd,
            env=env,
            input=stdin or "",
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise ConfigError(f"{command[0]} cannot be run: {error.strerror}", fix) from error
    if result.returncode != 0:
        raise ConfigError(_failed(command, result.returncode, result.stderr or result.stdout), fix)
    return result.stdout


def show(command: Sequence[str | Path], fix: str, *, cwd: Path | None = None) -> None:
    """Runs what takes long, with its output where the user sees it. Raises ConfigError where it fails."""
    try:
        status = subprocess.call(command, cwd=cwd, stdin=subprocess.DEVNULL)  # noqa: S603
    except OSError as error:
        raise ConfigError(f"{command[0]} cannot be run: {error.strerror}", fix) from error
    if status != 0:
        raise ConfigError(_failed(command, status, "see above"), fix)


def _failed(command: Sequence[str | Path], status: int, output: str) -> str:
    words = " ".join(str(word) for word in command[:3])
    last = "\n".join(f"  {line}" for line in output.strip().splitlines()[-LAST_LINES:])
    return f"`{words} ...` failed with status {status}:\n{last}"
