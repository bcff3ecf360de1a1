"""`hitl bench`: starts the benchmark in the checkout (it is not part of the package)."""

import subprocess
import sys

import typer

from claude_hitl_template.cli.program import ROOT, need_checkout
from claude_hitl_template.config.settings import Settings


def bench(context: typer.Context) -> None:
    """Compares turns, decisions and parking with the plain SDK. Needs a checkout; `--help` lists the options."""
    need_checkout("bench")
    Settings.load()  # settings that are wrong are said here, as by every command
    raise typer.Exit(subprocess.call([sys.executable, "-m", "tools.bench", *context.args], cwd=ROOT))  # noqa: S603
