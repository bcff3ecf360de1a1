"""Streams of one session share a reader: each receives every event after its cursor once and in order, even a slow one."""

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from claude_hitl_template.api.followers import Followers, Message, Subscription
from claude_hitl_template.domain.models import Event, utcnow
from claude_hitl_template.errors import NotFound
from claude_hitl_template.store.protocol import NOW

EVENTS = 300
PAGE = 7


class Log:
    """A ledger's `wait_events` over one session's log; `asked` counts its calls."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.deltas: list[dict[str, Any]] = []
        self.asked: list[tuple[int, float]] = []
        self.deleted = False
        self.previewing = asyncio.Event()
        self._changed = asyncio.Event()

    def commit(self, count: int = 1) -> None:
        for _ in range(count):
            seq = len(self.events) + 1
            self.events.append(
                Event(
                    seq=seq, id=f"sevt_{seq}", type="agent.message", payload={"n": seq},
                    created_at=utcnow(), processed_at=utcnow(),
                )
            )  # fmt: skip
        self.wake()

    def preview(self, delta: dict[str, Any]) -> None:
        self.deltas.append(delta)
        self.wake()

    def wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_events(
        self, _session: str, _key: str | None, after: int, *, timeout_s: float, previews: int | None = None
    ) -> tuple[list[Event], list[dict[str, Any]], int]:
        self.asked.append((after, timeout_s))
        if previews is not None:
            self.previewing.set()
        start = len(self.deltas) if previews == NOW else previews
        while True:
            if self.deleted:
                raise NotFound("no session")
            found = self.events[after : after + PAGE]
            deltas = [] if start is None else self.deltas[start:]
            if found or deltas or not timeout_s:
                return found, deltas, len(self.deltas)
            try:
                await asyncio.wait_for(self._changed.wait(), timeout_s)
            except TimeoutError:
                return [], [], len(self.deltas)


@pytest.fixture
def log() -> Log:
    return Log()


@pytest_asyncio.fixture
async def followers(log: Log) -> AsyncIterator[Followers]:
    yield Followers(log.wait_events, kept=20)
    await asyncio.sleep(0.01)
    # The loop is shared with other tests, whose tasks are not counted.
    left = [
        task for task in asyncio.all_tasks() if "_Follower" in repr(task) or "Log.wait_events" in repr(task)
    ]
    assert not left, "a follower without subscribers goes on"


async def read(one: Subscription, until: int, chance: random.Random | None = None) -> list[int]:
    """Returns the seqs that a stream receives, up to this one."""
    found: list[int] = []
    while not found or found[-1] < until:
        found += [m.event.seq for m in await one.next(10.0) if m.event is not None]
        if chance is not None and chance.random() < 0.3:  # a slow reader
            await asyncio.sleep(chance.random() * 0.02)
    return found


@pytest.mark.parametrize("seed", range(20))
async def test_each_stream_gets_every_event_behind_its_place_once_and_in_order(
    log: Log, followers: Followers, seed: int
) -> None:
    chance = random.Random(seed)
    log.commit(50)

    async def stream() -> None:
        await asyncio.sleep(chance.random() * 0.1)
        after = chance.randrange(len(log.events) + 1)
        one = followers.subscribe("s", "k", after, previews=chance.random() < 0.5)
        try:
            assert await read(one, EVENTS, chance) == list(range(after + 1, EVENTS + 1))
        finally:
            one.close()

    async def write() -> None:
        while len(log.events) < EVENTS:
            log.commit(min(chance.randrange(1, 12), EVENTS - len(log.events)))
            await asyncio.sleep(chance.random() * 0.01)

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        for _ in range(12):
            group.create_task(stream())
        group.create_task(write())


async def test_the_ledger_is_asked_as_often_for_a_hundred_streams_as_for_one(
    log: Log, followers: Followers
) -> None:
    streams = [followers.subscribe("s", "k", 0, previews=False) for _ in range(100)]
    for seq in range(1, 11):
        log.commit()
        got = await asyncio.gather(*(one.next(10.0) for one in streams))
        assert [[m.event.seq for m in messages if m.event] for messages in got] == [[seq]] * 100
    assert len(log.asked) <= 12
    for one in streams:
        one.close()


async def test_a_stream_that_reads_slowly_reads_the_log_itself_and_holds_up_no_other(
    log: Log, followers: Followers
) -> None:
    slow, quick = (followers.subscribe("s", "k", 0, previews=False) for _ in range(2))
    log.commit(100)
    assert await read(quick, 100) == list(range(1, 101))
    assert await read(slow, 100) == list(range(1, 101))
    assert [after for after, timeout_s in log.asked if not timeout_s], "it read from the log"
    slow.close()
    quick.close()


async def test_previews_go_to_the_streams_that_want_them_and_are_asked_for_while_there_are_some(
    log: Log, followers: Followers
) -> None:
    plain = followers.subscribe("s", "k", 0, previews=False)
    log.commit()
    assert len(await plain.next(10.0)) == 1
    await asyncio.sleep(0)
    wanting = followers.subscribe("s", "k", 1, previews=True)
    waiting = asyncio.create_task(wanting.next(10.0))
    await log.previewing.wait()
    log.preview({"type": "event_start", "event": {"id": "e", "type": "agent.message"}})
    assert [message.body["type"] for message in await waiting] == ["event_start"]
    log.commit()
    assert [m.event.seq for m in await plain.next(10.0) if m.event] == [2]
    plain.close()
    wanting.close()


async def test_a_deleted_session_ends_all_its_streams_and_none_waits(log: Log, followers: Followers) -> None:
    streams = [followers.subscribe("s", "k", 0, previews=False) for _ in range(3)]
    waiting = [asyncio.create_task(one.next(10.0)) for one in streams]
    await asyncio.sleep(0.01)
    log.deleted = True
    log.wake()
    for ended in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(ended, NotFound)
    for one in streams:
        one.close()


async def test_nothing_for_a_while_is_no_message(log: Log, followers: Followers) -> None:
    one = followers.subscribe("s", "k", 0, previews=False)
    assert await one.next(0.01) == []
    one.close()


def test_a_frame_is_made_once_and_names_its_place() -> None:
    message = Message({"type": "agent.message", "text": "ä"})
    assert message.frame == 'event: agent.message\ndata: {"type": "agent.message", "text": "ä"}\n\n'
    assert message.frame is message.frame
