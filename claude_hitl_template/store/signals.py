"""Wakes waiters of a topic and keeps previews of uncommitted events. Ledgers notify each other with notes."""

import asyncio
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from claude_hitl_template.domain.models import Event

CHANGES_KEPT = 5000  # of all approvals; a reader is rarely more than a few behind
EVENTS_KEPT = 100  # of one session, until they are asked for
PREVIEWS_KEPT = 1000  # of one session; who streams is rarely more than a few behind
# ["wake", topic], ["preview", session id, position, delta], ["forget", session id] or ["approval", position, change]
type Note = list[Any]


class Signals:
    """A version per topic, and a way to wait for the next one. Only topics with a waiter use memory."""

    def __init__(self) -> None:
        self._version = 0
        self._waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    @property
    def version(self) -> int:
        return self._version

    def notify(self, topic: str) -> None:
        self._version += 1
        self.wake(topic)

    def wake(self, topic: str) -> None:
        for event in self._waiting.get(topic, ()):
            event.set()

    def wake_all(self) -> None:
        for topic in list(self._waiting):
            self.wake(topic)

    def listen(self, *topics: str) -> "Listener":
        return Listener(self._waiting, topics)


class Listener:
    """Register first, read the store second, wait third: then no change is missed."""

    def __init__(self, waiting: defaultdict[str, set[asyncio.Event]], topics: Sequence[str]) -> None:
        self._waiting, self._topics, self._event = waiting, topics, asyncio.Event()

    def __enter__(self) -> "Listener":
        for topic in self._topics:
            self._waiting[topic].add(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        for topic in self._topics:
            self._waiting[topic].discard(self._event)
            if not self._waiting[topic]:
                del self._waiting[topic]

    async def wait(self, timeout_s: float) -> bool:
        """True when notified, False after `timeout_s`. May be called again."""
        try:
            await asyncio.wait_for(self._event.wait(), timeout_s)
        except TimeoutError:
            return False
        self._event.clear()
        return True


class RecentChanges:
    """Changes of approvals, for those who show them live. Positions are times, so that a reader can go on at another
    ledger; changes that are no longer kept, or were before this process, are reported as missing."""

    def __init__(self) -> None:
        self._kept: deque[tuple[int, dict[str, Any]]] = deque(maxlen=CHANGES_KEPT)
        self._newest = 0
        self.forget()

    def forget(self) -> None:
        """Something may have been missed: every reader must look at the store again."""
        self._kept.clear()
        self._since = self._now()

    def add(self, change: Mapping[str, Any], position: int | None = None) -> int:
        """Returns its position: microseconds, or one more than the newest, whichever is later. `position`: the one it has
        at another ledger, whose clock may be behind; a reader of this one must see it all the same."""
        position = self._now() if position is None else max(position, self._newest + 1)
        if len(self._kept) == CHANGES_KEPT:
            self._since = self._kept[0][0]
        self._kept.append((position, dict(change)))
        self._newest = position
        return position

    def after(self, position: int) -> tuple[list[dict[str, Any]], int, bool]:
        """The changes behind `position`, the position to ask from next, and whether these are all."""
        complete = position >= self._since
        found = [(at, change) for at, change in self._kept if at > position]
        newest = max([position if complete else self._now(), *(at for at, _ in found)])
        return [change for _, change in found], newest, complete

    def _now(self) -> int:
        self._newest = max(self._newest + 1, time.time_ns() // 1000)
        return self._newest


@dataclass
class _Followed:
    """The events of a session behind `first`. They are complete once `workspace_id` is known, from a read of the store."""

    until: float  # time.monotonic()
    workspace_id: str | None = None
    first: int = 0
    events: list[Event] = field(default_factory=list[Event])

    @property
    def last(self) -> int:
        return self.events[-1].seq if self.events else self.first


class RecentEvents:
    """The events that followers have yet to ask for, of sessions that are followed: so following reads no database. What may
    have a gap is forgotten, and read from the store.
    """

    def __init__(self) -> None:
        self._followed: OrderedDict[str, _Followed] = OrderedDict()  # whose follower asked last, at the end

    def want(self, session_id: str, for_s: float) -> None:
        """Someone is about to read the session's events, and again within `for_s`: keeps what is committed meanwhile."""
        now = time.monotonic()
        while self._followed and next(iter(self._followed.values())).until < now:
            self._followed.popitem(last=False)
        found = self._followed.setdefault(session_id, _Followed(now))
        found.until = max(found.until, now + for_s)
        self._followed.move_to_end(session_id)

    def know(self, session_id: str, workspace_id: str, last: int) -> None:
        """The store was read after `want`, and had the session's events up to `last`."""
        found = self._followed.get(session_id)
        if found is not None and found.workspace_id is None:
            events, found.events = found.events, []
            found.workspace_id, found.first = workspace_id, last
            self.add(session_id, [event for event in events if event.seq > last])

    def after(self, session_id: str, workspace_id: str | None, seq: int) -> list[Event] | None:
        """The events behind `seq`, and forgets those before; None if they have to be read."""
        found = self._followed.get(session_id)
        if found is None or found.workspace_id is None or workspace_id not in (None, found.workspace_id):
            return None
        if not found.first <= seq <= found.last:
            return None
        found.events, found.first = [event for event in found.events if event.seq > seq], seq
        return list(found.events)

    def add(self, session_id: str, events: Sequence[Event]) -> None:
        """Events that were committed."""
        found = self._followed.get(session_id)
        if found is None:
            return
        for event in events:
            is_next = found.workspace_id is None or event.seq == found.last + 1
            if not is_next or len(found.events) == EVENTS_KEPT:
                self.forget(session_id)
                return
            found.events.append(event)

    def forget(self, session_id: str) -> None:
        self._followed.pop(session_id, None)

    def forget_all(self) -> None:
        self._followed.clear()


class Previews:
    """Deltas of unfinished events. Their positions are times, so that a stream can continue at another ledger."""

    def __init__(self) -> None:
        self._newest = 0
        self._kept: dict[str, deque[tuple[int, dict[str, Any]]]] = {}
        self._wanted: dict[str, float] = {}  # by session, until when: time.monotonic()

    def want(self, session_id: str, for_s: float) -> None:
        """A stream asks for the session's previews, and does so again within `for_s`."""
        self._wanted[session_id] = max(self._wanted.get(session_id, 0.0), time.monotonic() + for_s)

    def are_wanted(self, session_id: str) -> bool:
        """Whether a stream asks for the session's previews, or did a moment ago."""
        return self._wanted.get(session_id, 0.0) > time.monotonic()

    def now(self) -> int:
        """The position of the next delta."""
        return max(self._newest, time.time_ns() // 1000)

    def add(self, session_id: str, delta: Mapping[str, Any], position: int | None = None) -> int:
        """Returns its position: microseconds, or one more than the newest, whichever is later."""
        position = max(self._newest + 1, time.time_ns() // 1000) if position is None else position
        kept = self._kept.setdefault(session_id, deque(maxlen=PREVIEWS_KEPT))
        kept.append((position, dict(delta)))
        self._newest = max(self._newest, position)
        return position

    def after(self, session_id: str, position: int | None) -> tuple[list[dict[str, Any]], int]:
        """The deltas behind `position`, and the position to ask from next; none for None."""
        if position is None:
            return [], 0
        found = [(number, delta) for number, delta in self._kept.get(session_id, ()) if number > position]
        return [delta for _, delta in found], max([position, *(number for number, _ in found)])

    def forget(self, session_id: str) -> None:
        self._kept.pop(session_id, None)
        self._wanted = {one: until for one, until in self._wanted.items() if until > time.monotonic()}
