"""What is measured, in which order."""

import asyncio
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from typing import Any

import psutil

from claude_hitl_template import __version__, code_version
from claude_hitl_template.bench.crowd import Waiting, footprint, make_crowd
from claude_hitl_template.bench.figures import Compare, Measure
from claude_hitl_template.bench.sides import (
    CALL,
    PACED,
    SETTLE_S,
    TEXT,
    Bare,
    Conversation,
    bare,
    confirmation,
    conversation,
)
from claude_hitl_template.bench.stage import LONG_S, Stage, private_bytes, stage, workplace
from claude_hitl_template.cli.client import Client
from claude_hitl_template.cli.common import step
from claude_hitl_template.model.tokens import mint
from claude_hitl_template.secrets import hash_api_key, read_api_key, read_signing_key
from claude_hitl_template.settings import Settings

STARTS_SHARE = 4
FIRST_EPOCH = 1  # of a session that never lost its owner
LISTINGS = 60
DECISIONS = 120
CLIENTS = 8
DECISIONS_A_CLIENT = 40
MIB = 1024 * 1024
MS = 1000.0


class Bench:
    """One run: `rounds` of what is quick, and a quarter of them of what needs a process started for each."""

    def __init__(self, rounds: int, sessions: int) -> None:
        self._rounds, self._sessions = rounds, sessions
        self._slow = math.ceil(rounds / STARTS_SHARE)
        self.measures: list[Measure] = []
        self.facts: dict[str, Any] = {}

    def run(self) -> None:
        """Raises HitlError when something failed."""
        self.facts = machine()
        with workplace() as settings:
            with stage(settings, hot_window_s=LONG_S, spare_owners=1) as one:
                self._hot(one)
            with stage(settings, hot_window_s=0.0, spare_owners=1) as one:
                self._parked(one, "decision to tool start, parked, spare owner ready")
                parked = self._leave_parked(one)
            with step(f"Making {self._sessions} parked sessions in the store, without CLIs"):
                key_hash = hash_api_key(read_api_key(settings))
                crowd = asyncio.run(make_crowd(settings.database_path, key_hash, self._sessions))
            with stage(settings, hot_window_s=0.0, spare_owners=0) as one:
                self._parked(one, "decision to tool start, parked, no spare owner")
                self._crowded(one, crowd)
            self._stored(settings, key_hash, parked)
        self.facts["load_after"] = os.getloadavg()

    def _new(
        self, name: str, unit: str, compare: Compare | None = None, target: float | None = None
    ) -> Measure:
        made = Measure(name, unit, compare, target)
        self.measures.append(made)
        return made

    # -- a session that is awake, and the bare SDK beside it

    def _hot(self, one: Stage) -> None:
        with step("Measuring turns and decisions of hot sessions"), conversation(one.client, TEXT) as ours:
            ours.until_rest()
            token = mint(read_signing_key(one.settings), ours.id, FIRST_EPOCH)
            folder = one.settings.data_dir / "bare"
            with bare(folder, f"{one.settings.base_url}/model", token) as theirs:
                self.facts["versions"]["claude-code"] = theirs.cli_version
                one.until_spare()
                self._turns(ours, theirs)
                self._decisions(one, ours, theirs)
                self._creations(one, theirs)

    def _turns(self, ours: Conversation, theirs: Bare) -> None:
        for name, prompt in (("a model that answers at once", TEXT), ("a model that takes a second", PACED)):
            made = self._new(f"text turn, hot, {name}", "ms", "ratio of p50", 1.25)
            _interleaved(made, partial(ours.turn, prompt), partial(theirs.turn, prompt), self._rounds)

    def _decisions(self, one: Stage, ours: Conversation, theirs: Bare) -> None:
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

    def _creations(self, one: Stage, theirs: Bare) -> None:
        made = self._new("create to first agent event (bare: connect to first message)", "ms")

        def create() -> float:
            one.until_spare()
            began = time.perf_counter()
            with conversation(one.client, TEXT) as fresh:
                fresh.until(lambda event: event["type"].startswith("agent."))
                seconds = time.perf_counter() - began
                fresh.until_rest()
            return seconds

        _interleaved(made, create, theirs.fresh, self._slow)

    # -- parked sessions

    def _parked(self, one: Stage, name: str) -> None:
        made = self._new(name, "ms", "p95", 3000)
        with step(f"Measuring: {name}"):
            self._wake(one)  # the first one warms up
            made.ours += [self._wake(one) * MS for _ in range(self._slow)]

    def _wake(self, one: Stage) -> float:
        with conversation(one.client, CALL) as ours:
            event_id = ours.until_asked()
            one.until_parked(ours.id)
            one.until_spare()
            return ours.call(one.settings.workspaces / ours.id, event_id)[1]

    def _leave_parked(self, one: Stage) -> str:
        made = self._new("processes of a parked session", "count", "p95", 0)
        with conversation(one.client, CALL, keep=True) as ours:
            ours.until_asked()
            one.until_parked(ours.id)
            made.ours.append(len(one.processes_of(ours.transcript_id)))
            return ours.id

    def _stored(self, settings: Settings, key_hash: str, parked: str) -> None:
        found = asyncio.run(footprint(settings.database_path, key_hash, parked))
        self._new("database rows of a parked session", "count").ours.append(found.rows)
        self._new("database records of a parked session", "KiB").ours.append(found.record_bytes / 1024)

    # -- a thousand of them

    def _crowded(self, one: Stage, crowd: list[Waiting]) -> None:
        alone = min(DECISIONS, len(crowd) // 2)
        together = crowd[alone : alone + CLIENTS * DECISIONS_A_CLIENT]
        with step(f"Measuring the inbox and decisions among {len(crowd)} parked sessions"):
            self._listings(one.client, len(crowd))
            made = self._new(f"decision acknowledged, {len(crowd)} parked sessions", "ms", "p95", 50)
            made.ours += _decide_all(one.client, crowd[:alone])
            self._decide_together(one.settings, together)

    def _listings(self, client: Client, count: int) -> None:
        for limit in (20, 100):
            made = self._new(f"pending approvals of {count} parked sessions, limit {limit}", "ms", "p95", 50)
            _seconds(lambda limit=limit: _inbox(client, limit))
            made.ours += [_seconds(lambda limit=limit: _inbox(client, limit)) * MS for _ in range(LISTINGS)]

    def _decide_together(self, settings: Settings, crowd: list[Waiting]) -> None:
        rate = self._new(f"decisions acknowledged a second, {CLIENTS} clients", "1/s")
        made = self._new(f"decision acknowledged, {CLIENTS} clients at once", "ms")
        clients = [Client.open(settings) for _ in range(CLIENTS)]
        shares = [crowd[index::CLIENTS] for index in range(CLIENTS)]
        for client in clients:
            _inbox(client, 1)
        with ThreadPoolExecutor(CLIENTS) as pool:
            began = time.perf_counter()
            found = list(pool.map(_decide_all, clients, shares))
            elapsed = time.perf_counter() - began
        for client, share in zip(clients, found, strict=True):
            client.close()
            made.ours += share
        rate.ours.append(len(crowd) / elapsed)


def machine() -> dict[str, Any]:
    """Where and with what it was measured."""
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


def _inbox(client: Client, limit: int) -> None:
    client.get("/v1/approvals", limit=limit, **{"states[]": "pending"})


def _decide_all(client: Client, crowd: Sequence[Waiting]) -> list[float]:
    """Milliseconds of each acknowledgement. Every other call is denied."""
    found: list[float] = []
    for number, waiting in enumerate(crowd):
        said = confirmation(waiting.event_ids[0], "deny" if number % 2 else "allow")
        path = f"/v1/sessions/{waiting.session_id}/events"
        found.append(_seconds(lambda path=path, said=said: client.post(path, {"events": [said]})) * MS)
    return found


def _seconds(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _private_mib(processes: Sequence[psutil.Process]) -> float:
    return sum(private_bytes(process) for process in processes) / MIB
