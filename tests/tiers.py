"""Selects the tests of a run by tier, and reports their cost (docs/contributing.md).

A test marked `slow` is slow, every other one is fast. A fast test whose call takes more than LIMIT_S fails, unless it is
marked `takes_long` with a reason.
"""

import os
import time
from collections import defaultdict
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil
import pytest

type Tier = Literal["fast", "slow", "all"]

LIMIT_S = 5.0
SLOWEST = 20  # number of tests that the summary names
WORTH_TELLING_S = 30.0  # a shorter run has no summary
CROWDED = 2.0  # how many times as long a test may take on a CPU that other processes use, too
LAG_S = 2.0  # the kernel may count waiting time this much later
_PRESSURE = [Path(f"/proc/pressure/{resource}") for resource in ("cpu", "io")]


def chosen(config: pytest.Config) -> Tier:
    """Returns the tier of `--tier`; by default, all tests that the command line names, otherwise the fast tier."""
    asked: Tier | None = config.getoption("--tier")
    if asked is not None:
        return asked
    named = config.args_source is pytest.Config.ArgsSource.ARGS or config.option.markexpr
    return "all" if named else "fast"


def tier_of(item: pytest.Item) -> Tier:
    return "slow" if item.get_closest_marker("slow") else "fast"


@dataclass(frozen=True)
class Clock:
    """A moment, in seconds of the clock, of this process and its ended children on a CPU, and of others' pressure."""

    wall: float
    cpu: float
    pressure: float | None

    @classmethod
    def read(cls) -> "Clock":
        used = os.times()
        cpu = used.user + used.system + used.children_user + used.children_system
        return cls(time.monotonic(), cpu, _pressure())

    def least_since(self, before: "Clock") -> float:
        """Seconds that the work would have taken at least on a machine of its own.

        Time in which something on this machine waited for a CPU or a disk proves nothing about a test, and a crowded CPU is
        slower: so a busy machine fails none. Without Linux's pressure figures only time on a CPU counts.
        """
        cpu = (self.cpu - before.cpu) / CROWDED
        if self.pressure is None or before.pressure is None:
            return cpu
        pressure = self.pressure - before.pressure
        return max(cpu, self.wall - before.wall - pressure - min(pressure, LAG_S))


def _pressure() -> float | None:
    """Seconds since the machine started in which some task waited for a CPU, and for a disk, and that a CPU was taken away.

    The last is of virtual machines, whose tasks do not know that they wait.
    """
    try:
        lines = [line for path in _PRESSURE for line in path.read_text().splitlines()]
    except OSError:
        return None
    waited = sum(int(line.rpartition("total=")[2]) for line in lines if line.startswith("some")) / 1e6
    return waited + getattr(psutil.cpu_times(), "steal", 0.0)


@dataclass
class Cost:
    tests: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.tests} tests, {self.wall_s:.0f} s, {self.cpu_s:.0f} s of a CPU"


@dataclass(eq=False)  # pytest puts plugins into sets
class Tiers:
    """The plugin: chooses tests, measures them, and says at the end what took longest."""

    tier: Tier
    limited: bool = True
    slowest: dict[str, float] = field(default_factory=lambda: defaultdict[str, float](float))
    totals: dict[str, Cost] = field(default_factory=lambda: defaultdict[str, Cost](Cost))
    _reported: Clock = field(default_factory=Clock.read)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        left = [item for item in items if self.tier not in ("all", tier_of(item))]
        if left:
            config.hook.pytest_deselected(items=left)
            items[:] = [item for item in items if self.tier == tier_of(item)]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None]:
        before = Clock.read()
        yield
        took = Clock.read().least_since(before)
        limited = self.limited and tier_of(item) == "fast" and not item.get_closest_marker("takes_long")
        if limited and took > LIMIT_S:
            pytest.fail(
                f"a fast test took {took:.1f} s, and {LIMIT_S:g} s are allowed: make it cheaper, "
                "or mark it slow or takes_long (docs/contributing.md)",
                pytrace=False,
            )

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        before, self._reported = self._reported, Clock.read()
        report.user_properties += [("tier", tier_of(item)), ("cpu_s", self._reported.cpu - before.cpu)]
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told = dict(report.user_properties)
        total = self.totals[str(told["tier"])]
        total.tests += report.when == "call"
        total.wall_s += report.duration
        total.cpu_s += float(str(told["cpu_s"]))
        self.slowest[report.nodeid] += report.duration

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if sum(self.slowest.values()) < WORTH_TELLING_S:
            return
        longest = sorted(self.slowest.items(), key=lambda pair: -pair[1])[:SLOWEST]
        terminalreporter.section(f"the {SLOWEST} slowest tests, with what they were first to start")
        for name, seconds in longest:
            terminalreporter.line(f"{seconds:7.1f} s  {name}")
        for tier, cost in sorted(self.totals.items()):
            terminalreporter.line(f"{tier} tier: {cost}")
