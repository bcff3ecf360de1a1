"""`hitl bench`: starts the benchmark in the checkout (it is not part of the package)."""

import subprocess
import sys

import typer

from claude_hitl_template.cli.commands.development import ROOT
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError


def bench(context: typer.Context) -> None:
    """Compares turns, decisions and parking with the plain SDK. Needs a checkout; `--help` lists the options."""
    if not (ROOT / "tools" / "bench" / "__main__.py").is_file():
        raise ConfigError(f"there is no benchmark in {ROOT}", "run it from a checkout of the project")
    Settings.load()  # settings that are wrong are said here, as by every command
    raise typer.Exit(subprocess.call([sys.executable, "-m", "tools.bench", *context.args], cwd=ROOT))  # noqa: S603
