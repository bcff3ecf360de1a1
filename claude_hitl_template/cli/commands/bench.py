"""`hitl bench` and `hitl soak`: start the tools in the checkout (they are not part of the package)."""

import subprocess
import sys

import typer

from claude_hitl_template.cli.program import ROOT, need_checkout
from claude_hitl_template.config.settings import Settings


def bench(context: typer.Context) -> None:
    """Compares turns, decisions and parking with the plain SDK. Needs a checkout; `--help` lists the options."""
    _run("bench", context)


def soak(context: typer.Context) -> None:
    """Works for some minutes and prints what grows. Needs a checkout; `--help` lists the options."""
    _run("soak", context)


def _run(name: str, context: typer.Context) -> None:
    need_checkout(name)
    Settings.load()  # settings that are wrong are said here, as by every command
    raise typer.Exit(subprocess.call([sys.executable, "-m", f"tools.{name}", *context.args], cwd=ROOT))  # noqa: S603
