"""Time measurements that survive jumps of the wall clock.

People and NTP set the wall clock, and a suspended machine skips time. The monotonic clock does not jump, but its values
mean nothing to another process.
"""

import time
from collections.abc import Callable

from claude_hitl_template.domain.models import Lease

JUMP_S = 5.0  # more than the two clocks drift apart between two checks
STEADY_S = 60.0

type Seconds = Callable[[], float]


class LeaseWatch:
    """Detects that a lease is no longer renewed, from repeated reads of it and without the wall clock."""

    def __init__(self, lease_s: float, monotonic: Seconds = time.monotonic) -> None:
        self._lease_s, self._monotonic = lease_s, monotonic
        self._seen: Lease | None = None
        self._since = 0.0

    def lapsed(self, lease: Lease, *, away_s: float = 0.0) -> bool:
        """Returns True if the lease has not changed for the lease's duration.

        Args:
            lease: The lease as just read.
            away_s: Seconds since the last call in which no owner could renew a lease; they do not count.
        """
        now = self._monotonic()
        if lease != self._seen:
            self._seen, self._since = lease, now
        self._since += away_s
        return now - self._since > self._lease_s


class SteadyClock:
    """Decides whether the wall clock can be trusted for irreversible actions: it has not jumped for `steady_s`.

    It is not trusted at first: a machine that just started may not have synchronised its clock yet.
    """

    def __init__(
        self, wall: Seconds = time.time, monotonic: Seconds = time.monotonic, *, steady_s: float = STEADY_S
    ) -> None:
        self._wall, self._monotonic, self._steady_s = wall, monotonic, steady_s
        self._apart = wall() - monotonic()
        self._since = monotonic()

    def steady(self) -> bool:
        """Returns True if no jump was seen for `steady_s`. Call it more often than that: each call detects jumps since
        the last one."""
        now = self._monotonic()
        before, self._apart = self._apart, self._wall() - now
        if abs(self._apart - before) > JUMP_S:
            self._since = now
        return now - self._since >= self._steady_s


class Pause:
    """A pause that ends by itself after a while, because the process that began it may have died."""

    def __init__(self, monotonic: Seconds = time.monotonic) -> None:
        self._monotonic = monotonic
        self._until: float | None = None

    def begin(self, for_s: float) -> None:
        self._until = self._monotonic() + for_s

    def end(self) -> None:
        self._until = None

    @property
    def left_s(self) -> float:
        """Seconds until the pause ends; 0 without one."""
        return 0.0 if self._until is None else max(self._until - self._monotonic(), 0.0)


class Backoff:
    """Exponential backoff: `first_s` seconds after the first failure, doubled after each further one, at most `most_s`."""

    def __init__(self, first_s: float, most_s: float, monotonic: Seconds = time.monotonic) -> None:
        self._first_s, self._most_s, self._monotonic = first_s, most_s, monotonic
        self._pause_s = 0.0
        self._again_at: float | None = None

    def failed(self) -> None:
        self._pause_s = min(max(self._pause_s * 2, self._first_s), self._most_s)
        self._again_at = self._monotonic() + self._pause_s

    def succeeded(self) -> None:
        self._pause_s, self._again_at = 0.0, None

    @property
    def left_s(self) -> float:
        """Seconds until the next try; 0 if it may be made now."""
        return 0.0 if self._again_at is None else max(self._again_at - self._monotonic(), 0.0)
