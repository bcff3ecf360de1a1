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
    """The program's standard output. Raises ConfigError with its last lines if it fails or is missing."""
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
    """Runs a long program with its output on the terminal. Raises ConfigError if it fails."""
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
