"""Waking those who wait for a change, inside one process."""

import asyncio
from collections import defaultdict


class Signals:
    """A version per topic, and a way to wait for the next one. Only topics somebody waits for cost memory."""

    def __init__(self) -> None:
        self._version = 0
        self._waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    @property
    def version(self) -> int:
        return self._version

    def listeners(self, topic: str) -> int:
        return len(self._waiting.get(topic, ()))

    def notify(self, topic: str) -> None:
        self._version += 1
        for event in self._waiting.get(topic, ()):
            event.set()

    def listen(self, topic: str) -> "Listener":
        return Listener(self._waiting, topic)


class Listener:
    """Register first, look at the store second, wait third: so that no change falls between."""

    def __init__(self, waiting: defaultdict[str, set[asyncio.Event]], topic: str) -> None:
        self._waiting, self._topic, self._event = waiting, topic, asyncio.Event()

    def __enter__(self) -> "Listener":
        self._waiting[self._topic].add(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting[self._topic].discard(self._event)
        if not self._waiting[self._topic]:
            del self._waiting[self._topic]

    async def wait(self, timeout_s: float) -> bool:
        """True when notified, False after `timeout_s`. May be called again."""
        try:
            await asyncio.wait_for(self._event.wait(), timeout_s)
        except TimeoutError:
            return False
        self._event.clear()
        return True
