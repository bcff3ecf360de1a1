"""`hitl chaos`: kills parts of a service under load and checks every guarantee afterwards."""

import secrets
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from claude_hitl_template.cli.program import ROOT, need_checkout
from claude_hitl_template.errors import ConfigError


def chaos(
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Duration of the faults. Default: 5, or until --kills.")
    ] = None,
    kills: Annotated[
        int | None,
        typer.Option(min=1, help="Ends after this number of killed processes."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of an earlier run, to repeat it. Default: random.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A file for all figures, faults and violations, as JSON."),
    ] = None,
    postgres: Annotated[
        bool, typer.Option("--postgres", help="Use a Postgres of its own and inject faults there, too.")
    ] = False,
) -> None:
    """Kills, stops and disconnects parts of its own service under load; exits 1 if a guarantee was broken.

    Needs a checkout with its tests. Does not touch the service that runs here; data of a failed run is kept.
    """
    need_checkout("chaos")
    if report is not None and not report.absolute().parent.is_dir():
        raise ConfigError(
            f"{report} cannot be written: there is no such folder", "choose another with --report"
        )
    chosen = secrets.randbelow(2**31) if seed is None else seed
    if minutes is None and kills is None:
        minutes = 5.0
    command, ends = [sys.executable, "-m", "tests.chaos", "--seed", str(chosen)], list[str]()
    if minutes is not None:
        command += ["--minutes", str(minutes)]
        ends.append(f"{minutes:g} minutes")
    if kills is not None:
        command += ["--kills", str(kills)]
        ends.append(f"{kills} kills")
    command += ["--report", str(report.absolute())] if report else []
    command += ["--postgres"] if postgres else []
    typer.echo(f"Seed {chosen}: faults for {' or '.join(ends)}, then some time until everything rests")
    raise typer.Exit(subprocess.call(command, cwd=ROOT))  # noqa: S603
