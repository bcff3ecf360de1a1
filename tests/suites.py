"""Runs the slow tier suite by suite within a budget, for `./hitl test --slow --budget MINUTES`.

Suites that the change touches come first, then the others. The commit's hash rotates the order within both groups, so
that every suite has its turn after some commits. A suite is started if its known cost fits into the rest of the budget.
`tests/green.json` has the last commit at which each suite passed; `--record` writes it, to be committed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from xml.etree import ElementTree  # of a report that pytest wrote here

ROOT = Path(__file__).parents[1]
GREEN = ROOT / "tests" / "green.json"
BASE_VARIABLE = "HITL_TEST_BASE"  # the commit that the change is compared with; default: the first parent
PACKAGE = "claude_hitl_template/"
LANES = 2
WHY_CHARS = 300
PATIENCE = 3  # times what a suite takes, after which it hangs
EVERYWHERE = ("pyproject.toml", "requirements", "tests/conftest.py", "tests/tiers.py", "tests/suites.py")
# What every conversation goes through.
CORE = ("session/", "cluster/", "store/", "claude/", "domain/")

# What everything else imports.
BASICS = ("__init__", "config/", "errors", "files/")


@dataclass(frozen=True)
class Suite:
    """`seconds`: on two CPUs with nothing else running. `touched_by`: beginnings of paths below the package, or of any.

    `busy`: it keeps both CPUs busy by itself.
    """

    name: str
    paths: tuple[str, ...]
    seconds: int
    touched_by: tuple[str, ...]
    busy: bool = False

    def is_touched(self, changed: Iterable[str]) -> bool:
        beginnings = (*EVERYWHERE, *(PACKAGE + part for part in self.touched_by), *self.touched_by)
        return any(suite_of(path) == self or path.startswith(beginnings) for path in changed)


# Of two suites that have a file, the one with the longer path runs it: a new file has a suite by its folder.
SUITES = (
    Suite(
        "chaos",
        ("tests/chaos/test_chaos.py",),
        530,
        (*CORE, "fault_points", "api/", "tests/chaos/"),
        busy=True,
    ),
    Suite(
        "fault points",
        ("tests/chaos/test_crash_runs.py",),
        200,
        (*CORE, "fault_points", "workspace/", "tests/chaos/"),
        busy=True,
    ),
    Suite("outbox", ("tests/chaos/test_outbox.py",), 60, ("store/", "notify/", "tests/chaos/")),
    Suite("decisions", ("tests/chaos",), 60, ("store/", "cluster/ledger", "tests/chaos/")),
    Suite(
        "gate",
        ("tests/contract/test_gate_hammer.py",),
        300,
        ("claude/", "session/", "domain/policy/", "model/", "store/"),
        busy=True,
    ),
    Suite(
        "vote races",
        ("tests/contract/test_vote_races.py",),
        260,
        ("store/", "domain/policy/tiers", "domain/people"),
    ),
    Suite(
        "contract",
        ("tests/contract", "tests/unit"),
        480,
        (*CORE, "model/", "api/", "signin/", "inbox/", "workspace/", "testing/", "tools/", *BASICS),
    ),
    Suite(
        "kill points",
        ("tests/integration/test_kill_points.py", "tests/integration/test_handing_over.py"),
        400,
        (*CORE, "fault_points", "query"),
    ),
    Suite(
        "cluster",
        ("tests/integration",),
        400,
        (*CORE, "api/", "query", "workspace/", "cli/", "README.md", "docs/quickstart.md"),
    ),
    Suite(
        "panel",
        ("tests/acceptance", "tests/integration/test_panel.py", "tests/integration/test_plain_commands.py"),
        400,
        ("panel/", "query", "api/", "presentation/", "cli/host/panel", "data/config/"),
    ),
    Suite(
        "inbox",
        ("tests/acceptance/test_inbox.py", "tests/acceptance/test_sign_in.py"),
        240,
        ("inbox/", "signin/", "presentation/", "notify/", "store/waiting", "api/"),
    ),
    Suite(
        "first hour",
        ("tests/first_hour",),
        400,
        ("cli/", "api/", "presentation/", "pyproject.toml", "compose.yaml", "docs/rest.md", "README.md"),
    ),
    Suite(
        "deploy",
        ("tests/integration/test_deploy.py",),
        300,
        ("cli/", "config/", "query", "profiles/"),
    ),
    Suite(
        "troubles",
        ("tests/integration/test_troubleshooting.py",),
        200,
        ("cli/", "config/", "presentation/checks", "docs/troubleshooting.md"),
    ),
    Suite(
        "containers",
        ("tests/acceptance/test_containers.py",),
        500,
        ("cluster/", "image/", "bin/", "Dockerfile", "template_"),
    ),
    Suite(
        "two hosts",
        ("tests/acceptance/test_two_hosts.py",),
        230,
        ("cluster/", "cli/", "query", "workspace/", "docs/orbstack-setup.md"),
    ),
)


def suite_of(path: str) -> Suite | None:
    """Returns the suite that contains a test file."""
    having = [(len(own), suite) for suite in SUITES for own in suite.paths if path.startswith(own)]
    return max(having, key=lambda pair: pair[0])[1] if having else None


def arguments(suite: Suite) -> list[str]:
    """Returns pytest's arguments: the suite's paths without those of other suites."""
    others = [path for other in SUITES if other != suite for path in other.paths]
    return [*suite.paths, *(f"--ignore={path}" for path in others if path.startswith(suite.paths))]


def touched_by(suites: Iterable[Suite], changed: Iterable[str]) -> list[Suite]:
    """Returns the suites that a change touches. A changed part of the product that no suite names touches all."""
    suites, changed = list(suites), list(changed)
    product = [path for path in changed if path.startswith(PACKAGE)]
    if not all(any(suite.is_touched([path]) for suite in suites) for path in product):
        return suites
    return [suite for suite in suites if suite.is_touched(changed)]


def in_order(suites: Sequence[Suite], changed: Iterable[str], turn: int) -> list[Suite]:
    """Returns the suites that the change touches and then the others, each group rotated to start at `turn`."""
    touched = touched_by(suites, changed)
    others = [suite for suite in suites if suite not in touched]
    return [*_rotated(touched, turn), *_rotated(others, turn)]


def _rotated(suites: list[Suite], turn: int) -> list[Suite]:
    first = turn % len(suites) if suites else 0
    return suites[first:] + suites[:first]


@dataclass(frozen=True)
class Ran:
    """`failed`: the tests of the suite that failed; empty also for a suite that was ended or could not begin."""

    suite: Suite
    seconds: float
    passed: bool
    failed: tuple[str, ...] = ()


type Run = Callable[[Suite], tuple[bool, tuple[str, ...]]]  # whether it passed, and which tests failed


def within(budget_s: float, suites: Iterable[Suite], run: Run, clock: Callable[[], float]) -> list[Ran]:
    """Runs suites whose cost fits into the rest of the budget, one by one. A running suite is not interrupted."""
    began, ran = clock(), list[Ran]()
    for suite in suites:
        before = clock()
        if before - began + suite.seconds <= budget_s:
            passed, failed = run(suite)
            ran.append(Ran(suite, clock() - before, passed, failed))
    return ran


def every(suites: Sequence[Suite], run: Run, clock: Callable[[], float]) -> list[Ran]:
    """Runs all suites: those that keep every CPU busy one by one, then the others concurrently, the longest first, so that
    the lanes end at about the same time."""

    def timed(suite: Suite) -> Ran:
        before = clock()
        passed, failed = run(suite)
        return Ran(suite, clock() - before, passed, failed)

    busy = [timed(suite) for suite in suites if suite.busy]
    others = sorted((suite for suite in suites if not suite.busy), key=lambda suite: -suite.seconds)
    with ThreadPoolExecutor(LANES) as lanes:
        return [*busy, *lanes.map(timed, others)]


def _ends_well(command: Sequence[str], limit_s: float) -> bool:
    """Returns whether it passes. A suite that hangs is ended, and has failed."""
    running = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return running.wait(limit_s) == 0
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        print(f"ended: it hung for {limit_s:.0f} s", flush=True)
        return False


def run_suite(suite: Suite, *, at_once: bool) -> tuple[bool, tuple[str, ...]]:
    """Runs a suite; returns whether it passed, and the tests that failed. With `at_once`, its output is shown while it runs,
    otherwise when it has ended."""
    title = f"\n== slow: {suite.name} (about {suite.seconds} s)"
    with tempfile.TemporaryDirectory(prefix="hitl-suite-") as folder:
        report = Path(folder) / "report.xml"
        options = ["--tier=slow", "-q", f"--junit-xml={report}"]
        command = [sys.executable, "-m", "pytest", *options, *arguments(suite)]
        if at_once:
            print(title, flush=True)
            passed = _ends_well(command, PATIENCE * suite.seconds)
        else:
            done = subprocess.run(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
            )
            print(f"{title}\n{done.stdout}", flush=True)
            passed = done.returncode == 0
        return passed, failed_in(report)


def failed_in(report: Path) -> tuple[str, ...]:
    """The tests that failed by pytest's report, each with the first line of why; () if there is no report."""
    if not report.exists():
        return ()
    found = list[str]()
    for case in ElementTree.parse(report).iter("testcase"):
        for problem in (*case.findall("failure"), *case.findall("error")):
            why = (problem.get("message") or "").partition("\n")[0][:WHY_CHARS]
            found.append(f"{case.get('classname')}::{case.get('name')}: {why}")
    return tuple(found)


# -- what git knows


def git(*words: str) -> str | None:
    """Runs git and returns its output; None if it fails, as outside of a clone or for a commit that a shallow clone
    lacks."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def changed_files() -> list[str] | None:
    """Returns the files that differ from the base commit, including uncommitted ones."""
    told = git("diff", "--name-only", os.environ.get(BASE_VARIABLE) or "HEAD^1")
    return None if told is None else told.splitlines()


# -- when each was last seen to pass

type Green = dict[str, dict[str, str]]


def read_green(path: Path = GREEN) -> Green:
    return json.loads(path.read_text()) if path.exists() else {}


def record(ran: Iterable[Ran], commit: str, day: str, path: Path = GREEN) -> None:
    """Records the suites that passed."""
    known = read_green(path)
    known |= {one.suite.name: {"commit": commit, "day": day} for one in ran if one.passed}
    path.write_text(json.dumps(dict(sorted(known.items())), indent=2) + "\n")


def told(suites: Sequence[Suite], ran: Iterable[Ran], green: Green) -> list[str]:
    """Returns a line for each suite: its result, or when it last passed."""
    by_suite = {one.suite: one for one in ran}
    lines = list[str]()
    for suite in suites:
        one, last = by_suite.get(suite), green.get(suite.name)
        if one is not None and one.passed:
            end = f"passed in {one.seconds:.0f} s"
        elif one is not None:
            unknown = "" if last else "; no run of it that passed is recorded"
            end = "\n    ".join([f"FAILED in {one.seconds:.0f} s{unknown}", *one.failed])
        elif last is not None:
            end = f"did not run (about {suite.seconds} s); last recorded to pass at {last['commit']}, {last['day']}"
        else:
            end = f"did not run (about {suite.seconds} s); no run of it that passed is recorded"
        lines.append(f"{suite.name:<14} {end}")
    return lines


def failures(ran: Iterable[Ran], green: Green, *, in_budget: bool) -> list[Ran]:
    """Those that fail the run. Within a budget, as CI has one, that is a suite which is recorded to have passed before:
    the failure of another says nothing of this change."""
    return [one for one in ran if not one.passed and (one.suite.name in green or not in_budget)]


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./hitl test --slow")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="default: enough for all")
    parser.add_argument(
        "--record", action="store_true", help=f"write what passed to {GREEN.relative_to(ROOT)}"
    )
    options = parser.parse_args(given)
    commit, changed = git("rev-parse", "HEAD"), changed_files()
    if changed is None:
        print(
            f"git does not know what this change is compared with ({BASE_VARIABLE} names it): no suite comes first"
        )
    suites = in_order(SUITES, changed or [], int(commit[:8], 16) if commit else 0)
    if options.budget is None:
        ran = every(suites, partial(run_suite, at_once=False), time.monotonic)
    else:
        ran = within(options.budget * 60, suites, partial(run_suite, at_once=True), time.monotonic)
    print("\n== the slow tier", *told(suites, ran, read_green()), sep="\n", flush=True)
    if options.record:
        if commit is None or git("status", "--porcelain"):
            print("nothing is recorded: what ran is not a commit")
        else:
            record(ran, commit[:12], datetime.now(UTC).date().isoformat())
    return int(bool(failures(ran, read_green(), in_budget=options.budget is not None)))


if __name__ == "__main__":
    sys.exit(main())
