"""Followers: one reader of a session's log for all of its streams, so that the ledger is queried only once for them."""

import asyncio
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

from claude_hitl_template.domain.models import Event
from claude_hitl_template.store.protocol import NOW

KEPT = 1000  # messages of one session; a stream further behind reads the log itself
KEPT_BYTES = 8 * 1024**2  # of their frames
GATHER_S = 0.0001  # for each stream: about what it costs to send it one message
ASK_S = 30.0  # timeout of one call of the ledger, which answers at once if there are messages

type WaitEvents = Callable[..., Awaitable[tuple[list[Event], list[dict[str, Any]], int]]]


@dataclass
class Message:
    """A committed event, or a preview of one (`event` is None)."""

    body: dict[str, Any]
    event: Event | None = None

    @cached_property
    def frame(self) -> str:
        """The message as a server-sent event, serialised once for all streams."""
        cursor = f"id: {self.event.seq}\n" if self.event is not None else ""
        data = json.dumps(self.body, ensure_ascii=False)
        return f"{cursor}event: {self.body['type']}\ndata: {data}\n\n"


class Followers:
    """The followers of all sessions that have a stream in this process."""

    def __init__(self, wait_events: WaitEvents, *, kept: int = KEPT) -> None:
        self._wait_events, self._kept = wait_events, kept
        self._by_session: dict[str, _Follower] = {}

    def subscribe(
        self, session_id: str, workspace_id: str | None, after: int, *, previews: bool
    ) -> "Subscription":
        """Follows a session that the key may read, from behind the event with this seq. `close` it in the end."""
        follower = self._by_session.get(session_id)
        if follower is None:
            follower = _Follower(self._wait_events, session_id, workspace_id, after, self._forget, self._kept)
            self._by_session[session_id] = follower
        return Subscription(follower, workspace_id, after, previews=previews)

    def _forget(self, follower: "_Follower") -> None:
        if self._by_session.get(follower.session_id) is follower:
            del self._by_session[follower.session_id]


@dataclass
class _Follower:
    """Reads messages after `last` from the ledger, as long as it has subscribers."""

    wait_events: WaitEvents
    session_id: str
    workspace_id: str | None
    last: int
    forget: Callable[["_Follower"], None]
    most: int
    kept: deque[Message] = field(default_factory=deque[Message])
    total: int = 0  # messages so far: a subscriber's place counts them
    failure: Exception | None = None
    subscribers: int = 0
    previewing: int = 0
    _first: int = field(init=False)  # every event behind this seq, up to `last`, is kept
    _bytes: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _position: int = NOW
    _asking: "asyncio.Task[Any] | None" = None
    _task: "asyncio.Task[None] | None" = None

    def __post_init__(self) -> None:
        self._first = self.last

    def has(self, after: int) -> bool:
        """Whether every event behind `after` that it has heard of is still kept."""
        return after >= self._first

    def join(self, *, previews: bool) -> None:
        self.subscribers += 1
        self.previewing += previews
        if previews and self.previewing == 1 and self._asking is not None:
            self._position = NOW
            self._asking.cancel()  # it asks again, with previews
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    def leave(self, *, previews: bool) -> None:
        self.subscribers -= 1
        self.previewing -= previews
        if not self.subscribers and self._task is not None:
            self.forget(self)
            self._task.cancel()

    async def wait(self, total: int, timeout_s: float) -> bool:
        """Waits until there are more messages than `total`. Returns False after `timeout_s`; raises the ledger's error."""
        if self.total == total and self.failure is None:
            try:
                await asyncio.wait_for(self._changed.wait(), timeout_s)
            except TimeoutError:
                return False
        if self.total == total and self.failure is not None:
            raise self.failure
        return True

    def since(self, total: int) -> list[Message]:
        """The messages behind the first `total`; those that are no longer kept are missing."""
        newest_first = list(islice(reversed(self.kept), self.total - total))
        return newest_first[::-1]

    async def _run(self) -> None:
        while True:
            position = self._position if self.previewing else None
            self._asking = asyncio.ensure_future(
                self.wait_events(
                    self.session_id, self.workspace_id, self.last, timeout_s=ASK_S, previews=position
                )
            )
            try:
                await asyncio.wait({self._asking})
            finally:
                self._asking.cancel()
            if self._asking.cancelled():
                continue
            error = self._asking.exception()
            if error is not None:
                self._end(error if isinstance(error, Exception) else RuntimeError(repr(error)))
                return
            events, previews, newest = self._asking.result()
            if position is not None:
                self._position = newest
            self._add([*(Message(preview) for preview in previews), *(Message(e.wire(), e) for e in events)])
            # The first message goes out at once. What follows while many streams are served goes out together.
            await asyncio.sleep(self.subscribers * GATHER_S)

    def _add(self, messages: list[Message]) -> None:
        for message in messages:
            self.kept.append(message)
            self._bytes += len(message.frame)
            if message.event is not None:
                self.last = message.event.seq
        while len(self.kept) > self.most or self._bytes > KEPT_BYTES:
            dropped = self.kept.popleft()
            self._bytes -= len(dropped.frame)
            if dropped.event is not None:
                self._first = dropped.event.seq
        self.total += len(messages)
        if messages:
            self._wake()

    def _end(self, error: Exception) -> None:
        self.failure = error
        self.forget(self)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class Subscription:
    """The position of one stream in a session's messages."""

    def __init__(self, follower: _Follower, workspace_id: str | None, after: int, *, previews: bool) -> None:
        self._follower, self._workspace_id = follower, workspace_id
        self._after, self._previews = after, previews
        self._total = follower.total
        # Events between `after` and the follower's last one may be kept, or have to be read.
        self._behind = True
        follower.join(previews=previews)

    def close(self) -> None:
        self._follower.leave(previews=self._previews)

    async def next(self, timeout_s: float) -> list[Message]:
        """The next messages, as soon as there are any; none after `timeout_s`. Raises what the ledger raises."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = await self._catch_up() if self._behind else self._fresh()
            if found:
                return found
            if self._behind:
                continue
            if not await self._follower.wait(self._total, max(deadline - time.monotonic(), 0)):
                return []

    def _fresh(self) -> list[Message]:
        """Returns the follower's messages since the last call; none if the stream fell behind its buffer."""
        follower = self._follower
        if not follower.has(self._after):
            self._behind = True
            return []
        messages, self._total = follower.since(self._total), follower.total
        return self._unseen(messages)

    async def _catch_up(self) -> list[Message]:
        """Reads the log itself, a page at a time, until the follower has what comes next."""
        follower = self._follower
        if follower.has(self._after):
            self._behind, self._total = False, follower.total
            return self._unseen([message for message in follower.kept if message.event is not None])
        events, _, _ = await follower.wait_events(
            follower.session_id, self._workspace_id, self._after, timeout_s=0.0, previews=None
        )
        return self._unseen([Message(event.wire(), event) for event in events])

    def _unseen(self, messages: list[Message]) -> list[Message]:
        """Without the events that this stream has had, and the previews that it does not want."""
        found = [m for m in messages if (self._previews if m.event is None else m.event.seq > self._after)]
        seqs = [message.event.seq for message in found if message.event is not None]
        self._after = max([self._after, *seqs])
        return found
