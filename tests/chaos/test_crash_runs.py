"""A process dies at each fault point of a conversation, and the process that continues it breaks no promise.

All cases run in the background, two at a time; each test waits for its own case and judges it. In the slow tier each case
has a conversation of its own. In the fast tier a few cases share one, whose processes die at one point after the other.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import batched
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
from tests import faults
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
# model that the call was interrupted. The model may go on without it. A timer saves what was heard: on a slow machine it
# may run out between the model's answer and the approval.
ALONE = ("open_calls.before_commit", "append_transcript.before_commit", "append_transcript.after_commit")
UNASKED = (*ALONE, "flush.before", "commit.before_commit", "commit.after_commit", "flush.after")
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


# The cases of one backing and decision that share a conversation, or the calls of the Store's writes.
type Chain = tuple[Case, ...]


def strikes(chain: Chain) -> list[str]:
    """Returns the point at which each life but the last one dies."""
    points = list[str]()
    for case in chain:
        if case.decision is not None and case.point.startswith("drop_lease") and not points:
            points.append("flush.after")  # the next life reports that the owner is gone
        points.append(case.point)
    return points


@dataclass(frozen=True)
class Played:
    """A chain that has run: its data, the planned strikes, and how each of its lives ended."""

    home: Home
    strikes: list[str]
    exits: list[int | None]

    def struck_as_planned(self) -> bool:
        return self.exits == [KILLED] * len(self.strikes) + [0] and self.struck() == self.strikes

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


def _around(*names: str) -> tuple[str, ...]:
    return tuple(point for point in POINTS if point.partition(".")[0] in names)


# The conversations of the fast tier, which have each point once. In each, the life after a death at one point reaches the
# next one. After a death at one of ALONE it may not. One at open_calls.after_commit is the last of its conversation: the
# transcript is written at the same time, so the next life may resume it or begin a new one.
SHARED: tuple[tuple[str, Literal["allow", "deny"], tuple[str, ...]], ...] = (
    ("sqlite", "deny", (*_around("create_session", "acquire"), "spawn.before", "open_calls.after_commit")),
    ("postgres", "allow", ("spawn.after", *_around("begin_turn"), "flush.before")),
    ("sqlite", "allow", (*_around("commit"), "flush.after", "drop_lease.before_commit")),
    ("postgres", "deny", ("defer.before_commit", "drop_lease.after_commit", *_around("send_events"))),
    ("sqlite", "deny", ("defer.after_commit", *_around("resume"))),
    ("postgres", "allow", ("run.before", *_around("claim"))),
    ("postgres", "deny", (*_around("save_workspace"), *_around("end_turn"))),
    ("sqlite", "allow", ("park.before", "run.after", "park.after")),
    ("postgres", "deny", _around("release")),
    *(
        (backing, "allow" if backing == "sqlite" else "deny", (point,))
        for backing, point in zip(("sqlite", "postgres", "sqlite"), ALONE, strict=True)
    ),
)
WRITES_AT_ONCE = 8


def fast_chains() -> list[Chain]:
    """Returns the chains of the fast tier: each point once, on one of the databases."""
    talks = [tuple(Case(backing, point, said) for point in points) for backing, said, points in SHARED]
    lists = enumerate(batched(STORE_POINTS, WRITES_AT_ONCE))
    return [*talks, *(tuple(Case(BACKINGS[n % 2 - 1], point) for point in points) for n, points in lists)]


def sampled(cases: list[Case]) -> list[Any]:
    """Marks cases: those of `fast_chains` are in the fast tier, the others are slow."""
    fast = {case for chain in fast_chains() for case in chain}
    return [pytest.param(case, marks=[] if case in fast else [pytest.mark.slow]) for case in cases]


def chained(cases: Sequence[Case]) -> list[Chain]:
    """Returns the chains in which these cases are run: those of the fast tier share one, each other case has its own."""
    shared = [tuple(case for case in chain if case in cases) for chain in fast_chains()]
    together = {case for chain in shared for case in chain}
    return [*filter(None, shared), *((case,) for case in cases if case not in together)]


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
    """Starts all selected cases of one backing in the background, and returns the chain of each."""
    tests = [item for item in request.session.items if "played" in getattr(item, "fixturenames", ())]
    cases: list[Case] = [test.callspec.params["case"] for test in tests]  # type: ignore[attr-defined]

    def begin(backing: str, databases: Databases) -> Playing:
        playing: Playing = {}
        for chain in chained([case for case in cases if case.backing == backing]):
            folder = tmp_path_factory.mktemp("case")
            playing |= dict.fromkeys(chain, lanes.submit(play, chain, processes, folder, databases))
        return playing

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


def play(chain: Chain, processes: ForkServerContext, root: Path, databases: Databases) -> Played:
    """Runs lives that end at the planned strikes, and one that does not, and makes a backup of their store."""
    with databases(root) as url:
        home, folder = Home(url, root), root / "faults"
        folder.mkdir()
        make_journal(root)
        planned, exits = strikes(chain), list[int | None]()
        for number, point in enumerate([*planned, None]):
            faults.forget_hits(folder)  # "1" is the first hit of this life
            (folder / "plan.json").write_text(json.dumps({point: {"1": "kill"}} if point else {}))
            exits.append(lived(processes, home, chain[0].decision, number))
        back_up(url, root / "backup.zip")
    return Played(home, planned, exits)


def lived(processes: ForkServerContext, home: Home, decision: str | None, number: int) -> int | None:
    """Runs one life in a process, and returns its exit code."""
    if decision is None:
        process = processes.Process(target=write_all, args=(home, number))
    else:
        process = processes.Process(target=live, args=(home, KINDS.index(decision)))
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
    assert played.struck_as_planned(), (played.struck(), played.exits)
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
    unasked = {*played.strikes} & {*UNASKED} and not record.approvals and not record.runs
    assert record.acknowledged or unasked
    assert case.decision == "allow" or UPLOADED in [file["path"] for file in saved]


@pytest.mark.parametrize("case", sampled(writes()), ids=str)
def test_a_write_whose_process_died_is_done_or_is_not_and_others_go_on(case: Case, played: Played):
    assert played.struck_as_planned(), (played.struck(), played.exits)
    record = read_dump(played.backup)
    assert [str(violation) for violation in (*logs_are_whole(record), *chains_are_whole(record))] == []
    assert set(record.events) == {s.id for s in record.sessions}
    assert {a.session_id for a in record.approvals} <= set(record.events)


def test_every_point_of_the_product_is_struck_but_those_that_need_ray():
    """The other points are the supervisor's: tests/integration/test_handing_over.py."""
    assert set(fault_points.POINTS) - set(POINTS) - set(STORE_POINTS) == {"own.before", "own.after"}
    fast = [case for chain in fast_chains() for case in chain]
    assert sorted(case.point for case in fast) == sorted([*POINTS, *STORE_POINTS])
    assert {*fast} <= {*conversations(), *writes()}


def test_the_guarantees_count_what_is_struck():
    said = (Path(__file__).parents[2] / "docs/guarantees.md").read_text()
    assert f"at each of {len(POINTS) + len(STORE_POINTS)} fault points" in said
    assert f"at each fault point, {len(conversations()) + len(writes())} cases" in said
