"""`python -m tools.soak`, which `./hitl soak` runs: works for some minutes, and prints what grows with it.

Sessions are created, take turns, run a command that a human allowed, park, and are deleted. What the service uses is
measured before and after, with no session left; the difference divided by owners, sessions, turns and hours is its slope.
"""

import json
import signal
import sqlite3
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.table import Table

from claude_hitl_template.cli.common import console, step
from claude_hitl_template.cli.host.processes import authenticate, node_address, temp_dir
from claude_hitl_template.cli.run import run
from claude_hitl_template.cluster import setup_worker
from claude_hitl_template.config.settings import Settings
from tools.bench.contenders import CALL, TEXT, conversation
from tools.bench.service_fixture import BenchService, command, running_service, temporary_settings, wait_for

KIB = 1024
TURNS = 3  # text turns of a session
WARM_UP = 2  # sessions before the first measurement, so that one-time costs are in it
GONE_S = 60.0  # what a deleted session had on the machine is removed within this time
IDLE_OWNERS = "ray::ClaudeSessionActor"
PARTS = ("Ledger", "Ingress", "Supervisor")
OTHERS = {
    "GCS": "gcs_server",
    "raylet": "raylet/raylet",
    "agent": "dashboard/agent.py",
    "fork server": setup_worker.TITLE,
}
EXPORTED = b"fun"  # Ray's namespace of the classes and functions that were sent to its workers
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Work:
    """What was done between two measurements."""

    owners: int = 0
    sessions: int = 0
    turns: int = 0
    hours: float = 0.0
    seen: set[int] = field(default_factory=set[int])  # process ids of owners


def soak(minutes: float) -> tuple[dict[str, float], dict[str, float], Work]:
    """What the service used before and after the work, by what it is, and the work. Raises HitlError."""
    with temporary_settings() as settings, running_service(settings, hot_window_s=0.0, spare_owners=1) as one:
        warming = Work()
        for _ in range(WARM_UP):
            _session(one, warming)
        before, work, began = _at_rest(one), Work(seen=set(warming.seen)), time.monotonic()
        with step(f"Working for {minutes:g} minutes"):
            while time.monotonic() < began + minutes * 60 or not work.sessions:
                _session(one, work)
        work.hours = (time.monotonic() - began) / 3600
        work.owners = len(work.seen - warming.seen)
        return before, _at_rest(one), work


def _session(one: BenchService, work: Work) -> None:
    """A session from its creation to its deletion: text turns, and a call that is allowed when it is parked."""
    with conversation(one.client, TEXT) as ours:
        ours.until_rest()
        work.seen |= {p.pid for p in one.processes() if command(p).startswith(IDLE_OWNERS)}
        for _ in range(TURNS - 1):
            ours.turn(TEXT)
        ours.say(CALL)
        event_id = ours.until_asked()
        one.until_parked(ours.id)
        ours.result(event_id)
        ours.until_rest()
    work.sessions += 1
    work.turns += TURNS + 1


def _at_rest(one: BenchService) -> dict[str, float]:
    """Measures when nothing is left of deleted sessions, or a minute after the last was deleted."""
    with step("Waiting until what deleted sessions had is removed"):
        deadline = time.monotonic() + GONE_S
        wait_for(
            "the removal of deleted sessions' folders",
            lambda: True if not session_files(one) or time.monotonic() > deadline else None,
        )
        one.until_spare()
    return measured(one)


def measured(one: BenchService) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, process in _processes(one):
        found[f"memory of {name}, KiB"] = process.memory_full_info().uss / KIB
        found[f"descriptors of {name}"] = process.num_fds()
    logs = {
        "Ray": [p for p in temp_dir(one.settings).glob("session_2*/logs/**/*") if p.is_file()],
        "the service": [p for p in one.settings.logs_dir.iterdir() if p.is_file()],
    }
    for name, files in logs.items():
        found[f"log files of {name}"] = len(files)
        found[f"log bytes of {name}, KiB"] = sum(path.stat().st_size for path in files) / KIB
    rows = {f"rows of {table}": count for table, count in rows_of(one.settings.database_path).items()}
    return {
        **found,
        **rows,
        "files of sessions": len(session_files(one)),
        "classes and functions in the GCS": _exported(one.settings),
    }


def _processes(one: BenchService) -> Iterator[tuple[str, psutil.Process]]:
    for part in PARTS:
        yield part, one.replica(part)
    for name, sign in OTHERS.items():
        # The raylet's command line has the agent's in it.
        found = [p for p in one.processes() if sign in command(p).split(" --")[0]]
        yield from ((name, process) for process in found[:1])


def session_files(one: BenchService) -> list[Path]:
    """The remains of sessions in the data folder: working folders, run folders, markers."""
    folder = one.settings.data_dir
    return [path for path in folder.rglob("*sesn_*") if path.exists()]


def rows_of(path: Path) -> dict[str, int]:
    """The number of rows of each table."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        names = [n for (n,) in database.execute("select name from sqlite_master where type = 'table'")]
        return {n: database.execute(f'select count(*) from "{n}"').fetchone()[0] for n in names}  # noqa: S608


def _exported(settings: Settings) -> int:
    """How many keys Ray's GCS has for classes and functions; each `ray.remote` of an owner's class would add one."""
    authenticate(settings)  # before Ray is imported, which reads it once
    from ray._raylet import GcsClient  # noqa: PLC0415  # pyright: ignore[reportAttributeAccessIssue]

    client = GcsClient(address=f"{node_address(settings)}:{settings.ray_port}")
    return len(client.internal_kv_keys(b"", namespace=EXPORTED, timeout=GONE_S))


def slopes(
    before: Mapping[str, float], after: Mapping[str, float], work: Work
) -> dict[str, dict[str, float]]:
    """The growth of everything that was measured, in all and for each owner, session, turn and hour; a part that was not
    used has no slope."""
    units: dict[str, float] = {
        "owner": work.owners, "session": work.sessions, "turn": work.turns, "hour": work.hours
    }  # fmt: skip
    return {
        name: {
            "before": before[name],
            "after": after[name],
            **{unit: (after[name] - before[name]) / count for unit, count in units.items() if count},
        }
        for name in before
    }


def table(found: Mapping[str, Mapping[str, float]], work: Work) -> Table:
    made = Table(
        title=f"{work.owners} owners started, {work.sessions} sessions, {work.turns} turns, {work.hours * 60:.0f} minutes",
        title_justify="left",
    )
    columns = ("before", "after", "owner", "session", "turn", "hour")
    made.add_column("what")
    for name in columns:
        made.add_column(name if name in ("before", "after") else f"per {name}", justify="right", no_wrap=True)
    for name, row in found.items():
        made.add_row(name, *(f"{row[column]:.2f}" if column in row else "-" for column in columns))
    return made


@contextmanager
def _ended_in_order() -> Generator[None]:
    """Ended from outside, the soak still ends what it started."""
    before: Any = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@app.command()
def main(
    minutes: Annotated[float, typer.Option(min=0, help="How long it works.")] = 10.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="A file for the figures.")] = None,
) -> None:
    """Works for some minutes and prints how memory, descriptors, files, rows and logs grow. Uses a service of its own."""
    with _ended_in_order():
        before, after, work = soak(minutes)
    found = slopes(before, after, work)
    console().print(table(found, work))
    if json_file is not None:
        done = {name: getattr(work, name) for name in ("owners", "sessions", "turns", "hours")}
        json_file.write_text(json.dumps({"work": done, "slopes": found}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run(app))
