"""What may be told from a clock that jumps. The wall clock is set by people and by NTP, a machine is suspended: only the
monotonic one goes evenly, and it means nothing in another process.
"""

import time
from collections.abc import Callable

from claude_hitl_template.domain.models import Lease

JUMP_S = 5.0  # more than the two clocks ever drift apart between two looks
STEADY_S = 60.0

type Seconds = Callable[[], float]


class LeaseWatch:
    """Whether a lease is still renewed, as one can tell who looks at it now and then. The wall clock is not asked."""

    def __init__(self, lease_s: float, monotonic: Seconds = time.monotonic) -> None:
        self._lease_s, self._monotonic = lease_s, monotonic
        self._seen: Lease | None = None
        self._since = 0.0

    def lapsed(self, lease: Lease, *, away_s: float = 0.0) -> bool:
        """True when it is what it was a lease's time ago. Time in which nobody could renew, `away_s`, does not count."""
        now = self._monotonic()
        if lease != self._seen:
            self._seen, self._since = lease, now
        self._since += away_s
        return now - self._since > self._lease_s


class SteadyClock:
    """Whether the wall clock may be believed where nothing could be taken back: it has not jumped for `STEADY_S`.

    At first it may not: a machine that just started may not have been told the time yet.
    """

    def __init__(
        self, wall: Seconds = time.time, monotonic: Seconds = time.monotonic, *, steady_s: float = STEADY_S
    ) -> None:
        self._wall, self._monotonic, self._steady_s = wall, monotonic, steady_s
        self._apart = wall() - monotonic()
        self._since = monotonic()

    def steady(self) -> bool:
        """To be asked more often than every `STEADY_S`: what jumped in between is noticed."""
        now = self._monotonic()
        before, self._apart = self._apart, self._wall() - now
        if abs(self._apart - before) > JUMP_S:
            self._since = now
        return now - self._since >= self._steady_s


class Pause:
    """Holds something back for a while. It ends by itself, for whoever began it may be gone."""

    def __init__(self, monotonic: Seconds = time.monotonic) -> None:
        self._monotonic = monotonic
        self._until: float | None = None

    def begin(self, for_s: float) -> None:
        self._until = self._monotonic() + for_s

    def end(self) -> None:
        self._until = None

    @property
    def left_s(self) -> float:
        """Seconds; 0 when nothing is held back."""
        return 0.0 if self._until is None else max(self._until - self._monotonic(), 0.0)


class Backoff:
    """When to try again what failed: after `first_s` seconds, then each time after twice as long, `most_s` at most."""

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
        """Seconds until the next try; 0: now."""
        return 0.0 if self._again_at is None else max(self._again_at - self._monotonic(), 0.0)
