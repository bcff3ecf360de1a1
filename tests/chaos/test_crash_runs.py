"""A process dies at each fault point of a conversation, and the process that continues it breaks no promise.

All cases run in the background, two at a time; each test waits for its own case and judges it.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import pytest

from claude_hitl_template import fault_points
from claude_hitl_template.store.backup import back_up
from claude_hitl_template.store.connect import migrate
from claude_hitl_template.store.sqlite import sqlite_url
from tests.chaos.crash_runs import UPLOADED, Home, live, write_all
from tests.chaos.dump import make_journal, read_dump, read_journal
from tests.chaos.oracle import chains_are_whole, judge, logs_are_whole
from tests.chaos.plans import KINDS, WORK
from tests.postgres import Server, serving

WRITES = (
    "create_session", "acquire", "begin_turn", "commit", "open_calls", "append_transcript", "defer", "end_turn",
    "save_workspace", "release", "send_events", "drop_lease", "claim",
)  # fmt: skip
STEPS = ("spawn", "flush", "park", "resume", "run")
POINTS = [
    *(f"{write}.{when}_commit" for write in WRITES for when in ("before", "after")),
    *(f"{step}.{when}" for step in STEPS for when in ("before", "after")),
]
# Points before the approval is durable: the transcript may contain a call without an approval, and the CLI reports to the
# model that the call was interrupted. The model may go on without it.
UNASKED = ("open_calls.before_commit", "append_transcript.before_commit", "append_transcript.after_commit")
# Not reached in a conversation; struck in lives (runs of a process) without a CLI.
STORE_POINTS = [
    point for point in fault_points.POINTS if point not in POINTS and point not in ("own.before", "own.after")
]
ONLY_ALLOWED = ("claim.", "run.")  # a call that is refused is not claimed
KILLED = -9
LANES = 2  # concurrent cases: as many as CI has CPUs
# Starting a process also reaps ended ones: if two threads did so at once, one of them would see no exit code.
_one_at_a_time = Lock()
BACKINGS = ("sqlite", "postgres")


@dataclass(frozen=True)
class Case:
    """A point at which a process dies. Without a decision, the process only calls the Store's writes, one by one."""

    backing: str
    point: str
    decision: Literal["allow", "deny"] | None = None

    def __str__(self) -> str:
        return "-".join(filter(None, (self.point, self.decision, self.backing)))

    @property
    def plans(self) -> list[dict[str, dict[str, str]]]:
        """The faults of each life except the last one."""
        strike = {self.point: {"1": "kill"}}
        if self.decision is not None and self.point.startswith("drop_lease"):
            return [
                {"flush.after": {"1": "kill"}},
                strike,
            ]  # the next life reports that the owner is gone
        return [strike]


@dataclass(frozen=True)
class Played:
    """A case that has run: its data, and how each of its lives ended."""

    home: Home
    exits: list[int | None]

    @property
    def backup(self) -> Path:
        return self.home.root / "backup.zip"

    def struck(self) -> list[str]:
        lines = (self.home.root / "faults" / "hits.jsonl").read_text().splitlines()
        return [hit["point"] for hit in map(json.loads, lines) if hit["did"]]


def conversations() -> list[Case]:
    """All cases: each point with each decision."""
    return [
        Case(backing, point, decision)
        for backing in BACKINGS
        for point in POINTS
        for decision in ("allow", "deny")
        if decision == "allow" or not point.startswith(ONLY_ALLOWED)
    ]


def writes() -> list[Case]:
    """The cases without a CLI. On SQLite there is one process, so there is no other to notify."""
    return [
        Case(backing, point)
        for backing in BACKINGS
        for point in STORE_POINTS
        if backing == "postgres" or not point.startswith("notify")
    ]


def sampled(cases: list[Case]) -> list[Any]:
    """Marks cases: each point is in the fast tier once, with alternating backings and decisions; the others are slow."""
    by_point: dict[str, list[Case]] = {}
    for case in cases:
        by_point.setdefault(case.point, []).append(case)
    fast = [its[(number + number // 4) % len(its)] for number, its in enumerate(by_point.values())]
    return [pytest.param(case, marks=[] if case in fast else [pytest.mark.slow]) for case in cases]


# -- playing them

type Databases = Callable[[Path], AbstractContextManager[str]]
type Playing = dict[Case, Future[Played]]


@pytest.fixture(scope="module")
def lanes() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(LANES)
    yield pool
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def start(
    request: pytest.FixtureRequest,
    processes: ForkServerContext,
    lanes: ThreadPoolExecutor,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, Databases], Playing]:
    """Starts all selected cases of one backing in the background."""
    tests = [item for item in request.session.items if "played" in getattr(item, "fixturenames", ())]
    cases: list[Case] = [test.callspec.params["case"] for test in tests]  # type: ignore[attr-defined]

    def begin(backing: str, databases: Databases) -> Playing:
        return {
            case: lanes.submit(play, case, processes, tmp_path_factory.mktemp("case"), databases)
            for case in cases
            if case.backing == backing
        }

    return begin


@pytest.fixture(scope="module")
def on_sqlite(
    start: Callable[[str, Databases], Playing], tmp_path_factory: pytest.TempPathFactory
) -> Playing:
    empty = tmp_path_factory.mktemp("schema") / "empty.db"
    migrate(sqlite_url(empty))

    def copy(root: Path) -> AbstractContextManager[str]:
        shutil.copy(empty, root / "store.db")
        return nullcontext(sqlite_url(root / "store.db"))

    return start("sqlite", copy)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def on_postgres(start: Callable[[str, Databases], Playing], postgres: Server) -> Playing:
    return start("postgres", lambda _root: postgres.database())


@pytest.fixture
def played(request: pytest.FixtureRequest, case: Case) -> Played:
    return request.getfixturevalue(f"on_{case.backing}")[case].result()


def play(case: Case, processes: ForkServerContext, root: Path, databases: Databases) -> Played:
    """Runs lives that end at the planned faults, and one that does not, and makes a backup of their store."""
    with databases(root) as url:
        home, plan = Home(url, root), root / "faults" / "plan.json"
        plan.parent.mkdir()
        make_journal(root)
        exits: list[int | None] = []
        for number, faults_of_life in enumerate([*case.plans, {}]):
            plan.write_text(json.dumps(faults_of_life))
            exits.append(lived(processes, home, case, number))
        back_up(url, root / "backup.zip")
    return Played(home, exits)


def lived(processes: ForkServerContext, home: Home, case: Case, number: int) -> int | None:
    """Runs one life of the case in a process, and returns its exit code."""
    if case.decision is None:
        process = processes.Process(target=write_all, args=(home, number))
    else:
        process = processes.Process(target=live, args=(home, KINDS.index(case.decision)))
    with _one_at_a_time:
        process.start()
    wait([process.sentinel])
    with _one_at_a_time:
        process.join()
    return process.exitcode


# -- judging them


@pytest.mark.takes_long("a process with the real CLI dies, and another one goes on")
@pytest.mark.parametrize("case", sampled(conversations()), ids=str)
def test_a_conversation_is_taken_up_wherever_its_process_died(case: Case, played: Played):
    assert played.exits == [KILLED] * len(case.plans) + [0]
    assert played.struck()[-1] == case.point
    saved = played.home.noted("saved")
    record = read_dump(
        played.backup,
        acknowledged=played.home.acknowledged(),
        created=[made["id"] for made in played.home.noted("created")],
        runs=read_journal(played.home.journal),
        files={file["session_id"]: file["text"] for file in saved if file["path"] == WORK},
    )
    assert [str(violation) for violation in judge(record)] == []
    assert {s.stop_reason["type"] for s in record.sessions if s.stop_reason} == {"end_turn"}
    assert len(record.runs) <= (case.decision == "allow")
    assert record.acknowledged or (case.point in UNASKED and not record.approvals and not record.runs)
    assert case.decision == "allow" or UPLOADED in [file["path"] for file in saved]


@pytest.mark.parametrize("case", sampled(writes()), ids=str)
def test_a_write_whose_process_died_is_done_or_is_not_and_others_go_on(case: Case, played: Played):
    assert played.exits == [KILLED, 0]
    assert played.struck() == [case.point]
    record = read_dump(played.backup)
    assert [str(violation) for violation in (*logs_are_whole(record), *chains_are_whole(record))] == []
    assert set(record.events) == {s.id for s in record.sessions}
    assert {a.session_id for a in record.approvals} <= set(record.events)


def test_every_point_of_the_product_is_struck_but_those_that_need_ray():
    """The other points are the supervisor's: tests/integration/test_handing_over.py."""
    assert set(fault_points.POINTS) - set(POINTS) - set(STORE_POINTS) == {"own.before", "own.after"}


def test_the_guarantees_count_what_is_struck():
    said = (Path(__file__).parents[2] / "docs/guarantees.md").read_text()
    assert f"at each of {len(POINTS) + len(STORE_POINTS)} fault points" in said
    assert f"at each fault point, {len(conversations()) + len(writes())} cases" in said
