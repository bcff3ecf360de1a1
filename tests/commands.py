"""Runs `hitl` commands in this process, as `./hitl` does, because starting a Python for each command takes a second."""

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from claude_hitl_template.cli.app import app
from claude_hitl_template.cli.run import run


def hitl(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command with this process's environment and folder and an empty standard input; returns exit status and
    output."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["hitl", *arguments])
        patch.setattr(sys, "stdin", io.StringIO())
        status = run(app)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())
