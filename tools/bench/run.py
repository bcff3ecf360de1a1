"""Runs the measurements in order."""

import asyncio
import math
import os
import platform
import time
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

import psutil

from claude_hitl_template import __version__, code_version
from claude_hitl_template.cli.common import step
from claude_hitl_template.cli.host import postgres
from claude_hitl_template.config.secret_files import hash_api_key, prepare, read_api_key
from claude_hitl_template.config.settings import Settings
from tools.bench import Part
from tools.bench.asks import hot_asks, parked_asks
from tools.bench.contenders import (
    CALL,
    PACED,
    SETTLE_S,
    TEXT,
    Conversation,
    SdkConversation,
    bare,
    conversation,
)
from tools.bench.figures import Compare, Measure
from tools.bench.parked_load import footprint, make_parked_load
from tools.bench.recovery import acknowledged_and_restarted, killed_and_gone_on
from tools.bench.scale import FEW, ScaleMeasurement
from tools.bench.service_fixture import (
    LONG_S,
    BenchService,
    private_bytes,
    running_service,
    temporary_settings,
)
from tools.bench.startup import startup
from tools.bench.storm import storm
from tools.bench.streams import watched_turns
from tools.bench.together import cpu_of_turns, turns_together

STARTS_SHARE = 4
WAKE_P95_MS = 3000
TURN_X = {TEXT: 1.6, PACED: 1.05}
MIB = 1024 * 1024
MS = 1000.0


class Bench:
    """One run: `rounds` of quick measurements, and a quarter as many of those that start a process each."""

    def __init__(
        self,
        rounds: int,
        sessions: int,
        parts: Collection[Part],
        *,
        storms: Sequence[int] = (),
        on_postgres: bool = False,
    ) -> None:
        self._rounds, self._sessions, self._parts, self._storms = rounds, sessions, set(parts), storms
        self._slow = math.ceil(rounds / STARTS_SHARE)
        self._on_postgres, self._stage = on_postgres, partial(running_service, on_postgres=on_postgres)
        self.measures: list[Measure] = []
        self.facts: dict[str, Any] = {}

    def run(self) -> None:
        """Raises HitlError when something failed."""
        self.facts = machine()
        with temporary_settings() as settings:
            self._awake(settings)
            self._parked(settings)
            if Part.CROWD in self._parts:
                self._crowd(settings)
            if Part.SANDBOX in self._parts:
                self._sandboxes(settings)
        if Part.STARTUP in self._parts:
            with temporary_settings() as settings:
                startup(settings, self._new)
        self.facts["load_after"] = os.getloadavg()

    def _awake(self, settings: Settings) -> None:
        """Measurements of sessions that keep their processes while a call waits."""
        if self._parts & {Part.TURNS, Part.ASKS, Part.TOGETHER, Part.STREAMS}:
            with self._stage(settings, hot_window_s=LONG_S, spare_owners=1) as one:
                self._hot(one)
                if Part.STREAMS in self._parts:
                    watched_turns(one, self._new, self._rounds)

    def _parked(self, settings: Settings) -> None:
        """Measurements of sessions that park as soon as a call waits."""
        parked = None
        if self._parts & {Part.TURNS, Part.ASKS, Part.STORM, Part.RECOVERY}:
            with self._stage(settings, hot_window_s=0.0, spare_owners=1) as one:
                if Part.TURNS in self._parts:
                    made = self._new(
                        "decision to tool start, parked, spare owner ready", "ms", "p95", WAKE_P95_MS
                    )
                    made.ours += self._wakes(one)
                    parked = self._leave_parked(one)
                if Part.ASKS in self._parts:
                    parked_asks(one, self._new, self._slow, spare=True)
                for count in self._storms if Part.STORM in self._parts else ():
                    storm(one, self._new, count)
                if Part.RECOVERY in self._parts:
                    self._recovery(one)
        if parked is not None:
            self._stored(settings, parked)
        if Part.ASKS in self._parts:
            with self._stage(settings, hot_window_s=0.0, spare_owners=0) as one:
                parked_asks(one, self._new, self._slow, spare=False)

    def _crowd(self, settings: Settings) -> None:
        """A few parked sessions, then many, with the same questions."""
        many = ScaleMeasurement(self._sessions)
        made = Measure(
            f"decision to tool start, no spare owner, {self._sessions} parked sessions (bare: {FEW})",
            "ms",
            "p95",
            WAKE_P95_MS,
        )
        for count, samples in ((FEW, made.bare), (self._sessions - FEW, made.ours)):
            few = samples is made.bare
            with step(f"Making {count} parked sessions in the store, without CLIs"), self._database(settings):
                parked_sessions = asyncio.run(make_parked_load(settings, _key_hash(settings), count))
            with self._stage(settings, hot_window_s=0.0, spare_owners=0) as one:
                with step(f"Measuring the inbox and decisions among {count} parked sessions"):
                    many.measure(one, parked_sessions, few=few)
                samples.extend(self._wakes(one))
        self.measures += [*many.measures, made]

    def _recovery(self, one: BenchService) -> None:
        for what, owner in (("CLI", False), ("owner", True)):
            made = self._new(
                f"{what} killed in the middle of an answer to the session going on", "s", "p95", 5
            )
            with step(f"Killing a session's {what}, {self._rounds} times"):
                made.ours += [killed_and_gone_on(one, owner=owner) for _ in range(self._rounds)]
        acknowledged = self._new("decision acknowledged while no owner lives", "ms", "p95", 200)
        restarted = self._new("all processes killed to the decided call's start", "s", "p95", 45)
        for number in range(self._slow):
            with step(f"Killing everything and starting it again, {number + 1} of {self._slow}"):
                said_s, started_s = acknowledged_and_restarted(one)
            acknowledged.ours.append(said_s * MS)
            restarted.ours.append(started_s)

    def _sandboxes(self, settings: Settings) -> None:
        """Two services at once, so that the machine's noise meets both."""
        with (
            temporary_settings() as others,
            self._stage(settings, hot_window_s=LONG_S, spare_owners=1, sandbox="on") as inside,
            self._stage(others, hot_window_s=LONG_S, spare_owners=1, sandbox="off") as outside,
            conversation(inside.client, TEXT) as ours,
            conversation(outside.client, TEXT) as theirs,
        ):
            ours.until_rest()
            theirs.until_rest()
            inside.until_spare()
            outside.until_spare()
            turn = self._new("text turn, hot, in a sandbox (bare: without one)", "ms", "ratio of p50", 1.15)
            start = self._new(
                "create to first agent event, in a sandbox (bare: without one)",
                "ms",
                "difference of p50",
                80,
            )
            memory = self._new(
                "private memory of a hot session in a sandbox (bare: without one)",
                "MiB",
                "difference of p50",
                5,
            )
            with step("Measuring sessions with a sandbox and without one"):
                _interleaved(turn, partial(ours.turn, TEXT), partial(theirs.turn, TEXT), self._rounds)
                _interleaved(
                    start,
                    partial(_create, inside, memory.ours),
                    partial(_create, outside, memory.bare),
                    self._slow,
                )

    @contextmanager
    def _database(self, settings: Settings) -> Generator[None]:
        """A Postgres of our own runs without the service for as long as the context lasts; SQLite needs no server."""
        prepare(settings)
        postgres.start_missing(settings, make=self._on_postgres)
        yield
        postgres.local(settings).stop()

    def _new(
        self, name: str, unit: str, compare: Compare | None = None, target: float | None = None
    ) -> Measure:
        made = Measure(name, unit, compare, target)
        self.measures.append(made)
        return made

    # -- an awake session compared with the plain SDK

    def _hot(self, one: BenchService) -> None:
        with step("Measuring turns and decisions of hot sessions"), conversation(one.client, TEXT) as ours:
            ours.until_rest()
            folder = one.settings.data_dir / "bare"
            alone = partial(bare, one, ours.id)
            with alone(folder / "one") as theirs:
                self.facts["versions"]["claude-code"] = theirs.cli_version
                one.until_spare()
                if Part.TURNS in self._parts:
                    self._turns(ours, theirs)
                    cpu_of_turns(one, ours, theirs, self._new, self._slow)
                    self._decisions(one, ours, theirs)
                    self._creations(one, theirs)
                if Part.ASKS in self._parts:
                    hot_asks(one, theirs, self._new, self._slow)
            if Part.TOGETHER in self._parts:
                turns_together(one, alone, folder, self._new, self._slow)

    def _turns(self, ours: Conversation, theirs: SdkConversation) -> None:
        for name, prompt in (("a model that answers at once", TEXT), ("a model that takes a second", PACED)):
            made = self._new(f"text turn, hot, {name}", "ms", "ratio of p50", TURN_X[prompt])
            _interleaved(made, partial(ours.turn, prompt), partial(theirs.turn, prompt), self._rounds)

    def _decisions(self, one: BenchService, ours: Conversation, theirs: SdkConversation) -> None:
        started = self._new("decision to tool start, hot", "ms", "difference of p50", 50)
        acknowledged = self._new("decision acknowledged, hot", "ms")
        memory = self._new("private memory of a hot session: CLI and owner (bare: CLI and client)", "MiB")

        def decide() -> float:
            ours.say(CALL)
            event_id = ours.until_asked()
            time.sleep(SETTLE_S)
            said, tool = ours.call(one.settings.workspaces / ours.id, event_id)
            acknowledged.ours.append(said * MS)
            return tool

        _interleaved(started, decide, theirs.call, self._rounds)
        del acknowledged.ours[0]  # the warm-up's
        memory.ours.append(_private_mib(one.processes_of(ours.transcript_id)))
        memory.bare.append(_private_mib(theirs.processes()))

    def _creations(self, one: BenchService, theirs: SdkConversation) -> None:
        made = self._new("create to first agent event (bare: connect to first message)", "ms")
        _interleaved(made, partial(_create, one), theirs.fresh, self._slow)

    # -- parked sessions

    def _wakes(self, one: BenchService) -> list[float]:
        """Milliseconds from a decision on a parked call to the start of its tool."""
        with step("Measuring: decision to tool start, parked"):
            self._wake(one)  # the first one warms up
            return [self._wake(one) * MS for _ in range(self._slow)]

    def _wake(self, one: BenchService) -> float:
        with conversation(one.client, CALL) as ours:
            event_id = ours.until_asked()
            one.until_parked(ours.id)
            one.until_spare()
            return ours.call(one.settings.workspaces / ours.id, event_id)[1]

    def _leave_parked(self, one: BenchService) -> str:
        made = self._new("processes of a parked session", "count", "p95", 0)
        with conversation(one.client, CALL, keep=True) as ours:
            ours.until_asked()
            one.until_parked(ours.id)
            made.ours.append(len(one.processes_of(ours.transcript_id)))
            return ours.id

    def _stored(self, settings: Settings, parked: str) -> None:
        with self._database(settings):
            found = asyncio.run(footprint(settings, _key_hash(settings), parked))
        self._new("database rows of a parked session", "count").ours.append(found.rows)
        self._new("database records of a parked session", "KiB").ours.append(found.record_bytes / 1024)


def _key_hash(settings: Settings) -> str:
    return hash_api_key(read_api_key(settings))


def _create(one: BenchService, memory_mib: list[float] | None = None) -> float:
    """Seconds from a new session to its first agent event.

    `memory_mib` is given the private memory of the session's processes afterwards; the CLI's heap differs by ten MiB from
    one process to the next, so that one sample says little.
    """
    one.until_spare()
    began = time.perf_counter()
    with conversation(one.client, TEXT) as fresh:
        fresh.until(lambda event: event["type"].startswith("agent."))
        seconds = time.perf_counter() - began
        fresh.until_rest()
        if memory_mib is not None:
            memory_mib.append(_private_mib(one.processes_of(fresh.transcript_id)))
    return seconds


def machine() -> dict[str, Any]:
    """The machine and the versions with which it was measured."""
    return {
        "machine": {
            "system": platform.platform(),
            "cpus": psutil.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "versions": {
            "claude-hitl": __version__,
            "code": code_version(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("ray", "claude-agent-sdk")},
        },
        "load_before": os.getloadavg(),
    }


def _interleaved(made: Measure, ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> None:
    """Both sides, round by round, so that the machine's noise meets both; the first round warms up."""
    ours()
    theirs()
    for number in range(rounds):
        sides = [(made.ours, ours), (made.bare, theirs)]
        for samples, action in sides if number % 2 else reversed(sides):
            samples.append(action() * MS)


def _private_mib(processes: Sequence[psutil.Process]) -> float:
    return sum(private_bytes(process) for process in processes) / MIB
