"""Decisions that must not depend on a clock that jumps."""

from datetime import UTC, datetime, timedelta

import pytest

from claude_hitl_template.cluster.clocks import STEADY_S, Backoff, LeaseWatch, Pause, SteadyClock
from claude_hitl_template.domain.models import Lease

LEASE_S = 15.0
HOUR_S, DAYS_S = 3600.0, 35 * 86400.0


class Clocks:
    """A wall clock and a monotonic clock. Both advance; only the wall clock jumps."""

    def __init__(self) -> None:
        self.wall_s, self.monotonic_s = 1_900_000_000.0, 1000.0

    def go(self, seconds: float) -> None:
        self.wall_s += seconds
        self.monotonic_s += seconds

    def wall(self) -> float:
        return self.wall_s

    def monotonic(self) -> float:
        return self.monotonic_s


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


def lease(clocks: Clocks) -> Lease:
    """Returns the lease that the store would grant at this time."""
    ends = datetime.fromtimestamp(clocks.wall(), UTC) + timedelta(seconds=LEASE_S)
    return Lease(epoch=1, holder="owner", expires_at=ends)


@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S, DAYS_S, -DAYS_S])
def test_a_lease_that_is_renewed_lives_over_a_jump_and_one_that_is_not_lapses_in_time(
    clocks: Clocks, jump_s: float
):
    watch, held = LeaseWatch(LEASE_S, clocks.monotonic), lease(clocks)
    assert not watch.lapsed(held)
    clocks.wall_s += jump_s
    clocks.go(LEASE_S / 2)
    assert not watch.lapsed(held)
    held = lease(clocks)
    assert not watch.lapsed(held)
    clocks.go(LEASE_S)
    assert not watch.lapsed(held)
    clocks.go(0.1)
    assert watch.lapsed(held)


def test_time_in_which_nobody_could_renew_does_not_count(clocks: Clocks):
    watch, held = LeaseWatch(LEASE_S, clocks.monotonic), lease(clocks)
    assert not watch.lapsed(held)
    clocks.go(40)
    assert not watch.lapsed(held, away_s=35)
    clocks.go(11)
    assert watch.lapsed(held)


@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S, DAYS_S, -DAYS_S])
def test_the_time_is_not_believed_for_a_while_after_a_jump_nor_after_its_return(
    clocks: Clocks, jump_s: float
):
    clock = SteadyClock(clocks.wall, clocks.monotonic)
    believed = [clock.steady()]
    for jumped_s in (0.0, jump_s, -jump_s):
        clocks.wall_s += jumped_s
        believed.append(clock.steady())
        clocks.go(STEADY_S - 1)
        believed.append(clock.steady())
        clocks.go(1)
        believed.append(clock.steady())
    assert believed == [False, *[False, False, True] * 3]


def test_a_clock_that_is_corrected_little_by_little_stays_believed(clocks: Clocks):
    clock = SteadyClock(clocks.wall, clocks.monotonic)
    clocks.go(STEADY_S)
    for _ in range(1000):
        clocks.go(1)
        clocks.wall_s += 0.1
        assert clock.steady()


def test_a_pause_ends_by_itself_or_when_it_is_ended() -> None:
    clocks = Clocks()
    pause = Pause(clocks.monotonic)
    assert pause.left_s == 0
    pause.begin(30)
    clocks.go(20)
    assert pause.left_s == 10
    pause.end()
    assert pause.left_s == 0
    pause.begin(30)
    clocks.go(31)
    assert pause.left_s == 0


def test_what_fails_is_tried_again_after_twice_as_long_each_time_and_at_once_after_a_success() -> None:
    clocks = Clocks()
    backoff = Backoff(5, 30, clocks.monotonic)
    waited: list[float] = []
    for _ in range(5):
        assert backoff.left_s == 0
        backoff.failed()
        waited.append(backoff.left_s)
        clocks.go(waited[-1])
    assert waited == [5, 10, 20, 30, 30]
    backoff.failed()
    backoff.succeeded()
    assert backoff.left_s == 0
    backoff.failed()
    assert backoff.left_s == 5
