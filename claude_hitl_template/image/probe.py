"""Looks at an image from inside. Sent to its Python on standard input, so it uses the standard library alone.

Its argument is a JSON object: `cli_folder` (in the SDK), `manifest` (a file), and lists of paths: `writable` folders,
what is `expected`, and what is `owned` by the image, so that no session may change it. Prints a JSON object.
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def main(asked: dict[str, Any]) -> dict[str, Any]:
    return {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "versions": {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()},
        "code": _code(),
        "cli": _cli(asked["cli_folder"]),
        "uid": os.getuid(),
        "home": os.environ.get("HOME", ""),
        "becomes_root": [name for name in ("sudo", "doas") if shutil.which(name)],
        "not_writable": [path for path in asked["writable"] if not _can_create(path)],
        "missing": [path for path in asked["expected"] if not os.path.lexists(path)],
        "changeable": [path for path in asked["owned"] if os.path.lexists(path) and _can_change(Path(path))],
        "manifest": _text(asked["manifest"]),
    }


def _code() -> str | None:
    if importlib.util.find_spec("claude_hitl_template") is None:
        return None
    from claude_hitl_template import code_version  # noqa: PLC0415

    return code_version()


def _cli(folder: str) -> str:
    spec = importlib.util.find_spec("claude_agent_sdk")
    if spec is None or spec.origin is None:
        return "claude_agent_sdk is not installed"
    program = Path(spec.origin).parent / folder / "claude"
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
    except (OSError, subprocess.SubprocessError) as error:
        return f"it does not run: {error}"
    return done.stdout.strip() if done.returncode == 0 else f"status {done.returncode}: {done.stderr.strip()}"


def _can_create(folder: str) -> bool:
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _can_change(path: Path) -> bool:
    """Whether anything at or below a path can be written, removed or replaced."""
    below = [path, *(path.rglob("*") if path.is_dir() else ())]
    return any(os.access(each, os.W_OK) and not each.is_symlink() for each in below) or _can_move(path)


def _can_move(path: Path) -> bool:
    moved = path.with_name(f"{path.name}.moved")
    try:
        path.rename(moved)
    except OSError:
        return False
    moved.rename(path)
    return True


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
