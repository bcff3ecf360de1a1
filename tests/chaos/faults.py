"""Injects faults (strikes) chosen by a seed, and measures how long the service takes to answer again.

Three rows of strikes run concurrently. Light strikes go on during all others, and hit single sessions, or the database
for some seconds. Hidden strikes are prepared, and hit the next process that calls the model, reaches a fault point, or
commits. Heavy strikes kill or stop a part of the service, and each waits until the service answers.
"""

import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

import httpx
import psutil
import psycopg

from claude_hitl_template.cli.host.processes import temp_dir
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.events import END_TURN
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.store.owners import LEASE_S
from tests.chaos.databases import Postgres, Sqlite
from tests.chaos.disk import Disk
from tests.chaos.flaky_model import MISFORTUNES, UnluckyModel
from tests.chaos.oracle import Lost
from tests.chaos.points import Points
from tests.chaos.tcp_proxy import LOSE, RESET, Line
from tests.chaos.victims import Victims
from tests.integration.harness import Service

PAST_LEASE_S = (LEASE_S + 1, LEASE_S + 5)
HEALTH_S = 120.0  # a service that does not answer for so long is started again, as an operator would
UP_S = 600.0  # how long starting is tried again: a busy machine takes minutes for one try
LIGHT_PAUSE_S, HIDDEN_PAUSE_S, HEAVY_PAUSE_S = 0.5, 0.8, 12.0  # mean times between two strikes
DATABASE_REST_S = 6.0  # without strikes on the database, so that restarted processes can connect to it
BEFORE_S, AFTER_S = 2.0, 8.0  # without other strikes, around a kill whose recovery is measured
CALM_S = 10.0  # how long such a kill waits for the effects of earlier strikes to end

QUIET = ", all else quiet"
MACHINE = "lose the machine"
# The weight of each kind within its row.
LIGHT = {
    "kill the CLI": 10,
    "kill the owner": 9,
    f"kill the CLI{QUIET}": 0.4,
    f"kill the owner{QUIET}": 0.4,
    "stop the CLI past the lease": 1,
    "stop the owner past the lease": 2,
}
HIDDEN = {
    **{f"the model {misfortune}": 3 for misfortune in MISFORTUNES},
    "the model is silent": 0.3,
    "at a fault point: kill": 1.5,
    "at a fault point: delay 2": 6,
    "at a fault point: fail": 2,
    "at a fault point: lose": 2.5,
}
ON_SQLITE = {"lock the database": 12}
ON_DISK = {"fill the disk": 1}
ON_POSTGRES = {
    "cut the database's connections": 3,
    RESET: 4,
    "slow the database down": 4,
    "silence the database": 1,
}
HIDDEN_ON_POSTGRES = {LOSE: 6}
HEAVY = {
    "kill the ledger": 4,
    "kill the ingress": 4,
    "kill the supervisor": 3,
    "kill the Serve controller": 2,
    "kill the proxy": 2,
    "kill the fork server": 0.5,
    "stop the ledger": 2,
    "stop the ingress past the lease": 1,
    "stop the supervisor past the lease": 1,
    "stop the fork server past the lease": 0.5,
    "kill the raylet": 0.15,
    "kill the GCS": 0.15,
    "kill the whole cluster": 0.15,
    MACHINE: 0.15,
}
HEAVY_ON_POSTGRES = {"stop the database": 1.5}


@dataclass(frozen=True)
class Strike:
    """A fault that happened.

    Attributes:
        session_id: The session of the process that was hit.
        lasted_s: How long it lasted; for a heavy one, until the service answered again.
    """

    kind: str
    at: datetime
    victim: str
    session_id: str | None = None
    lasted_s: float = 0.0

    @property
    def kills(self) -> bool:
        return self.kind.startswith(("kill ", "at a fault point: kill"))


@dataclass(frozen=True)
class Struck:
    victim: str
    session_id: str | None = None
    lasts_s: float = 0.0
    at: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True)
class Targets:
    """The targets of strikes. `database` is a file, or a server with the proxy in front of it. `met` collects the faults
    prepared for the model or the proxy that a request has hit."""

    service: Service
    victims: Victims
    model: UnluckyModel
    points: Points
    database: Sqlite | tuple[Postgres, Line]
    disk: Disk | None
    met: Sequence[Strike]


class Row:
    """Chooses kinds of strikes by a seed: first each one once, in random order, and then by weight."""

    def __init__(self, seed: str, weights: Mapping[str, float], pause_s: float) -> None:
        self.chance = random.Random(seed)
        self._weights, self._pause_s = weights, pause_s
        self._due = sorted(weights)
        self.chance.shuffle(self._due)
        self._missed = False

    def pause_s(self) -> float:
        return self.chance.expovariate(1 / self._pause_s)

    def next(self) -> str:
        missed, self._missed = self._missed, False
        if self._due and not missed:
            return self._due.pop(0)
        [kind] = self.chance.choices(list(self._weights), list(self._weights.values()))
        return kind

    def missed(self, kind: str) -> None:
        """Records that the strike had no target: its kind is chosen again after another one."""
        self._missed = True
        self._due.append(kind)


class Striker:
    """Runs `rows`, each in its own thread, until `end` is called. `done` then returns the strikes."""

    def __init__(self, targets: Targets, seed: int) -> None:
        self._targets, self._service, self._victims = targets, targets.service, targets.victims
        on_sqlite = isinstance(targets.database, Sqlite)
        light = {**LIGHT, **(ON_SQLITE if on_sqlite else ON_POSTGRES), **(ON_DISK if targets.disk else {})}
        heavy = {**HEAVY, **({} if on_sqlite else HEAVY_ON_POSTGRES)}
        hidden = {**HIDDEN, **({} if on_sqlite else HIDDEN_ON_POSTGRES)}
        self._light = Row(f"{seed} light strikes", light, LIGHT_PAUSE_S)
        self._hidden = Row(f"{seed} hidden strikes", hidden, HIDDEN_PAUSE_S)
        self._heavy = Row(f"{seed} heavy strikes", heavy, HEAVY_PAUSE_S)
        self._whom = random.Random(f"{seed} victims")  # its use depends on the number of targets
        self._fire = threading.Lock()  # held during a strike, so that a quiet one can exclude all others
        self._whole = threading.Event()  # cleared while the service is being started
        self._whole.set()
        self._answers = threading.Event()  # cleared until the service answers after a heavy strike
        self._answers.set()
        self._effects: list[float] = []  # when the effects of light strikes end
        self._database_rests_until = 0.0
        self._ending = threading.Event()
        self._began = time.monotonic()
        self.struck_s = 0.0  # duration of the strikes, set at their end
        self._done: list[Strike] = []
        self._at_points: list[Strike] = []
        self.lost: list[Lost] = []

    @property
    def rows(self) -> Sequence[Callable[[], None]]:
        return (
            lambda: self._strike_lightly(self._light),
            lambda: self._strike_lightly(self._hidden),
            self._strike_heavily,
        )

    def _strike_lightly(self, row: Row) -> None:
        while not self._ending.wait(row.pause_s()):
            self._victims.go_on()
            self._whole.wait()
            kind = row.next()
            with self._fire:  # a quiet strike holds the lock until its end, others only for a moment
                struck = self._strike(kind, row) if kind.endswith(QUIET) else None
            if not kind.endswith(QUIET):
                struck = self._strike(kind, row)
            if struck is None:
                row.missed(kind)
                continue
            self._effects.append(time.monotonic() + struck.lasts_s)
            if row is self._light:  # hidden strikes are counted when a process has hit them
                self._done.append(Strike(kind, struck.at, struck.victim, struck.session_id, struck.lasts_s))

    def _strike_heavily(self) -> None:
        while not self._ending.wait(self._heavy.pause_s()):
            kind = self._heavy.next()
            with self._fire:
                self._answers.clear()
            at, began = datetime.now(UTC), time.monotonic()
            struck = self._strike(kind, self._heavy)
            self._recover()
            self._answers.set()
            if struck is None:
                self._heavy.missed(kind)
                continue
            lasted_s = max(struck.lasts_s, time.monotonic() - began)
            self._done.append(Strike(kind, at, struck.victim, struck.session_id, lasted_s))

    def end(self) -> None:
        self.struck_s = time.monotonic() - self._began
        self._ending.set()

    def come_to_an_end(self) -> None:
        """Ends all effects once the rows have ended, and waits until the service answers."""
        self._targets.points.clear()
        self._victims.go_on(all_of_them=True)
        self._recover()

    def done(self) -> list[Strike]:
        """Returns all strikes so far, oldest first."""
        self._at_points += [
            Strike(f"at a fault point: {hit.did}", hit.at, hit.point) for hit in self._targets.points.hits()
        ]
        return sorted([*self._done, *self._at_points, *self._targets.met], key=lambda strike: strike.at)

    # -- striking

    def _strike(self, kind: str, row: Row) -> Struck | None:
        """Strikes; returns None if there was no target. Draws all random numbers first, so that the number of targets does
        not change the sequence."""
        part, times = row.chance.random(), row.chance.randint(1, 3)
        with suppress(psutil.Error, sqlite3.Error, psycopg.Error, ConfigError):  # the target is down already
            return self._strike_now(kind, part, times)
        return None

    def _strike_now(self, kind: str, part: float, times: int) -> Struck | None:
        match kind.split():
            case ["kill", "the", "whole", "cluster"]:
                self._service.kill_everything()
                return Struck("all processes")
            case ["lose", "the", "machine"]:
                return self._lose_machine()
            case ["the", "model", *what]:
                taken = self._targets.model.fail(" ".join(what), 1 if "silent" in what else times)
                return Struck("its next requests") if taken else None
            case ["at", "a", "fault", "point:", *action]:
                point = self._targets.points.plan(part, " ".join(action))
                return Struck(point) if point else None
            case ["fill", "the", "disk"]:
                return self._fill(3 + 5 * part)
            case [how, "the", *name] if kind.removesuffix(QUIET) in _ON_PROCESSES:
                what = " ".join(name).removesuffix(QUIET).removesuffix(" past the lease")
                stop_s = None if how == "kill" else _between(PAST_LEASE_S, part)
                return self._hit(what, stop_s, quiet=kind.endswith(QUIET))
            case _:
                return self._strike_database(kind, part, times)

    def _hit(self, what: str, stop_s: float | None, *, quiet: bool) -> Struck | None:
        found = self._victims.find(what)
        if quiet and found:
            self._wait_for_calm()
            found = self._victims.find(what)
        if not found:
            return None
        process, session_id = self._whom.choice(found)
        struck = Struck(f"{what}, process {process.pid}", session_id, stop_s or 0.0)
        if not self._victims.hit(process, session_id, stop_s):
            return None
        if quiet:
            self._ending.wait(AFTER_S)
        return struck

    def _wait_for_calm(self) -> None:
        """Waits until the known effects of earlier strikes have ended. The caller's lock keeps other rows from striking."""
        deadline = time.monotonic() + CALM_S
        while self._restless() and time.monotonic() < deadline and not self._ending.is_set():
            self._victims.go_on()
            time.sleep(0.1)
        self._ending.wait(BEFORE_S)

    def _restless(self) -> bool:
        now = time.monotonic()
        self._effects = [until for until in self._effects if until > now]
        return bool(self._effects) or self._victims.stopped > 0 or not self._answers.is_set()

    def _fill(self, for_s: float) -> Struck | None:
        if self._targets.disk is None:
            return None
        struck = Struck(f"for {for_s:.1f} s", lasts_s=for_s)
        self._targets.disk.fill(for_s)
        return struck

    def _strike_database(self, kind: str, part: float, times: int) -> Struck | None:
        if kind in HIDDEN_ON_POSTGRES:  # it hits the next commit
            return self._strike_database_now(kind, part, times)
        began = time.monotonic()
        if began < self._database_rests_until and kind not in HEAVY_ON_POSTGRES:
            return None
        struck = self._strike_database_now(kind, part, times)
        self._database_rests_until = max(began + struck.lasts_s, time.monotonic()) + DATABASE_REST_S
        return struck

    def _strike_database_now(self, kind: str, part: float, times: int) -> Struck:
        database = self._targets.database
        if isinstance(database, Sqlite):
            struck = Struck(f"for {4 * part:.1f} s", lasts_s=4 * part)
            database.lock(4 * part)
            return struck
        server, line = database
        match kind.split(maxsplit=1)[0]:
            case "cut":
                return Struck(f"{server.cut()} connections")
            case "reset":
                return Struck(f"{line.reset()} connections")
            case "slow":
                line.slow(0.2 + 1.8 * part, 3.0 * times)
                return Struck(f"each answer {0.2 + 1.8 * part:.1f} s later", lasts_s=3.0 * times)
            case "silence":
                line.silent(2 + 8 * part)
                return Struck(f"for {2 + 8 * part:.1f} s", lasts_s=2 + 8 * part)
            case "lose":
                line.lose_answers(times)
                return Struck("the next commits")
            case "stop":
                server.stop(40 * part)
                return Struck(f"for {40 * part:.1f} s")
            case _:
                raise AssertionError(kind)

    def _lose_machine(self) -> Struck:
        """Kills all processes, and deletes the files of Ray and the agents; those of the store and the file area stay."""
        self._service.kill_everything()
        database = self._targets.database
        sessions = (database if isinstance(database, Sqlite) else database[0]).sessions()
        over = (s for s in sessions if s.lease is None and s.stop_reason == END_TURN)
        self.lost.append(Lost(datetime.now(UTC), frozenset(s.id for s in over)))
        settings = Settings.model_construct(data_dir=self._service.root / "data")
        run = self._service.root / "data" / "run"
        for folder in (temp_dir(settings), settings.workspaces, settings.markers, run):
            shutil.rmtree(folder, ignore_errors=True)
        return Struck("all processes, Ray's folder, all workspaces")

    # -- recovery

    def _recover(self) -> None:
        """Waits until the service answers and its store can be written. Starts a dead cluster again."""
        began = time.monotonic()
        while not self._healthy():
            self._victims.go_on()
            if not self._head_lives() or time.monotonic() - began > HEALTH_S:
                self._up()
            time.sleep(0.05)

    def _healthy(self) -> bool:
        with suppress(httpx.HTTPError):
            return (
                self._head_lives()
                and httpx.get(f"{self._service.base}/v1/health", timeout=5).status_code == 200
            )
        return False

    def _head_lives(self) -> bool:
        with suppress(psutil.Error):
            return self._service.head().status() != psutil.STATUS_ZOMBIE
        return False

    def _up(self) -> None:
        self._whole.clear()
        self._victims.go_on(all_of_them=True)
        try:
            bring_up(self._service)
        finally:
            self._whole.set()


_ON_PROCESSES = {
    kind.removesuffix(QUIET)
    for kind in (*LIGHT, *HEAVY)
    if kind.startswith(("kill the", "stop the")) and kind != "kill the whole cluster"
}


def _between(bounds: tuple[float, float], part: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * part


def bring_up(service: Service) -> None:
    """Runs `./hitl up` until it succeeds, as an operator of a busy machine would. Raises ConfigError after UP_S."""
    deadline = time.monotonic() + UP_S
    while (done := service.hitl("up")).returncode != 0:
        if time.monotonic() > deadline:
            raise ConfigError(f"the service does not start:\n{done.stderr}", "read its logs")
