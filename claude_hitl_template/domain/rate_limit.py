"""How often something may be tried: a bucket of tries for each key, refilled steadily, in constant memory."""

import time
from collections import OrderedDict
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address

REMEMBERED = 10_000


class Throttle:
    """`tries` at once for each key, and as many again over each `period_s`.

    Args:
        tries: Size of a bucket.
        period_s: In which an empty bucket is full again.
        keys: How many buckets are kept. A key that is not kept has a full one; the one used longest ago goes first.
        clock: Seconds, never going back.
    """

    def __init__(
        self,
        tries: int,
        period_s: float,
        *,
        keys: int = REMEMBERED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tries, self._per_s, self._keys, self._clock = tries, tries / period_s, keys, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, key: str) -> float:
        """Seconds until an attempt is available; 0 if one is."""
        left, _ = self._bucket(key)
        return 0.0 if left >= 1 else (1 - left) / self._per_s

    def take(self, key: str) -> None:
        """Uses a try up, if one is left."""
        left, now = self._bucket(key)
        self._keep(key, max(left - 1, 0.0), now)

    def give_back(self, key: str) -> None:
        """Returns the try that `take` used up."""
        left, now = self._bucket(key)
        self._keep(key, left + 1, now)

    def _bucket(self, key: str) -> tuple[float, float]:
        now = self._clock()
        left, at = self._buckets.get(key, (float(self._tries), now))
        return min(left + (now - at) * self._per_s, self._tries), now

    def _keep(self, key: str, left: float, now: float) -> None:
        self._buckets.pop(key, None)
        if left >= self._tries:
            return
        self._buckets[key] = left, now
        if len(self._buckets) > self._keys:
            self._buckets.popitem(last=False)


class Backoff:
    """After `free` failures of a key, each further one doubles the time until its next attempt.

    Args:
        free: Failures without a wait.
        first_s: The first wait.
        longest_s: The longest wait, which bounds what someone else's failures can cost.
        forgotten_s: After this time without a failure, a key begins again.
        keys: How many keys are kept; the one used longest ago goes first.
        clock: Seconds, never going back.
    """

    def __init__(
        self,
        *,
        free: int,
        first_s: float,
        longest_s: float,
        forgotten_s: float,
        keys: int = REMEMBERED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._free, self._first_s, self._longest_s, self._forgotten_s = free, first_s, longest_s, forgotten_s
        self._keys, self._clock = keys, clock
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def wait_s(self, key: str) -> float:
        """Seconds until an attempt is available; 0 if one is."""
        count, at = self._known(key)
        if count <= self._free:
            return 0.0
        # The exponent is bounded, because a float is.
        wait = min(self._first_s * 2.0 ** min(count - self._free - 1, 64), self._longest_s)
        return max(at + wait - self._clock(), 0.0)

    def failed(self, key: str) -> None:
        """Counts a failure."""
        count, _ = self._known(key)
        self._failures.pop(key, None)
        self._failures[key] = count + 1, self._clock()
        if len(self._failures) > self._keys:
            self._failures.popitem(last=False)

    def succeeded(self, key: str) -> None:
        """Forgets a key's failures."""
        self._failures.pop(key, None)

    def _known(self, key: str) -> tuple[int, float]:
        count, at = self._failures.get(key, (0, 0.0))
        return (count, at) if count and self._clock() - at < self._forgotten_s else (0, 0.0)


def network_of(host: str) -> str:
    """The key under which attempts from an address are counted: for IPv6 its /64, since one machine may use all of it."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if not isinstance(address, IPv6Address):
        return str(address)
    mapped = address.ipv4_mapped
    return str(mapped) if mapped else str(IPv6Address(int(address) >> 64 << 64))
