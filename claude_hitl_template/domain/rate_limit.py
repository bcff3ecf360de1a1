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
