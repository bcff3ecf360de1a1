"""`python -m tools.bench`, which `./hitl bench` runs: compares the service with the plain SDK on this machine."""

import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from claude_hitl_template.cli.common import console
from claude_hitl_template.cli.run import run
from claude_hitl_template.errors import ConfigError
from tools.bench import Part
from tools.bench.figures import p50_by_name, table
from tools.bench.run import Bench

LEAST_SESSIONS = 100
STORM = 25
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bench(
    rounds: Annotated[int, typer.Option(min=1, help="How often each quick thing is measured.")] = 8,
    *,
    sessions: Annotated[
        int, typer.Option(min=LEAST_SESSIONS, help="How many parked sessions the inbox is measured with.")
    ] = 1000,
    only: Annotated[
        list[Part] | None,
        typer.Option(help="Measure this part and no other. May be repeated."),
    ] = None,
    postgres: Annotated[
        bool, typer.Option("--postgres", help="Keep the store in a Postgres of its own.")
    ] = False,
    storm: Annotated[
        list[int] | None,
        typer.Option(min=1, help="How many parked calls are allowed at once. May be repeated."),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option("--compare", help="The --json file of an earlier run: prints the ratio to it."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="A file for figures, samples, machine and versions.")
    ] = None,
) -> None:
    """Compares turns, decisions and parking with the plain SDK, and many parked sessions with few; measures watchers,
    wake-ups, starts, restarts and sandboxes.

    Takes some minutes. Uses a service of its own, and leaves nothing behind. A target that is not met is not a failure.
    """
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ConfigError(
            f"{json_file} cannot be written: there is no such folder", "choose another with --json"
        )
    earlier = None if compare is None else _earlier(compare)
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # ended from outside, it still ends what it started
    parts = only or list(Part)
    made = Bench(rounds, sessions, parts, storms=storm or [STORM], on_postgres=postgres)
    try:
        made.run()
    finally:  # after a failure, what was measured before it
        measures = [measure for measure in made.measures if measure.ours]
        console().print(table(measures, earlier))
        if json_file is not None:
            figures = {**made.facts, "measures": [measure.as_json() for measure in measures]}
            json_file.write_text(json.dumps(figures, indent=2) + "\n")
    if Part.CROWD in parts:
        typer.echo(
            f"The {sessions} parked sessions were made in the store, without running their CLIs; all else ran for real."
        )


def _earlier(file: Path) -> dict[str, float]:
    try:
        return p50_by_name(json.loads(file.read_bytes()))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--compare: {file} cannot be used ({error})", "name the --json file of an earlier run"
        ) from error


if __name__ == "__main__":
    sys.exit(run(app))
