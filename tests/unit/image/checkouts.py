"""Creates Git repositories for tests, and writes the files of a checkout."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

type Write = Callable[[str, Any], Path]


def git(folder: Path, *arguments: str) -> str:
    who = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.org", "GIT_COMMITTER_NAME": "a"}
    done = subprocess.run(
        ["git", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **who, "GIT_COMMITTER_EMAIL": "a@example.org"},
    )
    return done.stdout.strip()


def committed(folder: Path) -> str:
    """Makes a folder a git repository, and commits all files in it; returns the commit."""
    if not (folder / ".git").exists():
        git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=change")
    return git(folder, "rev-parse", "HEAD")
