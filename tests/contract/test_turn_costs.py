"""How many transactions of the store a turn of an awake session takes, with a client that follows it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from claude_hitl_template.domain import events
from claude_hitl_template.domain.models import Event, Snapshot, Usage
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.protocol import TranscriptPart
from tests.contract.test_store import KEY, begun, log, message, send


class Counted:
    """Counts the transactions of a backend."""

    def __init__(self, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writes = self.reads = 0
        begin = backend.begin

        @asynccontextmanager
        async def counting(*, write: bool) -> AsyncGenerator[Any]:
            self.writes, self.reads = self.writes + write, self.reads + (not write)
            async with begin(write=write) as tx:
                yield tx

        monkeypatch.setattr(backend, "begin", counting)


async def following(store: CoreStore, session_id: str, heard: list[Event]) -> None:
    """As an ingress does for the streams of a session."""
    while True:
        after = heard[-1].seq if heard else 0
        heard += (await store.wait_events(session_id, KEY, after, timeout_s=30))[0]


async def until(heard: list[Event], last: int) -> None:
    while not heard or heard[-1].seq < last:
        await asyncio.sleep(0.001)


async def a_turn(store: CoreStore, session_id: str, before: Snapshot, number: int) -> Snapshot:
    """As an owner does that is awake: it waits, says what it was sent, and commits the answer and the turn's end."""
    waiting = asyncio.create_task(store.wait_session(session_id, 1, before.session.revision, timeout_s=30))
    await asyncio.sleep(0)
    await send(store, session_id, message(f"turn {number}"))
    seen = await asyncio.wait_for(waiting, 5)
    if seen.turn_event is None:
        await store.begin_turn(session_id, 1, seen.queued[0].id)
    key: Any = {"scope": session_id, "project_key": "-", "session_id": "t", "subpath": ""}
    said: list[TranscriptPart] = [(key, [{"uuid": f"u{number}", "text": "hi"}])]
    drafts = [events.agent_message(f"a{number}", "hi")]
    await store.commit(session_id, 1, drafts, transcript=said)
    return await store.end_turn(
        session_id, 1, [], end_id=f"e{number}", usage=Usage(), stop_reason=events.END_TURN
    )


async def test_a_text_turn_takes_three_writes_and_two_reads(
    store: CoreStore, backend: Any, monkeypatch: pytest.MonkeyPatch
):
    session_id = await begun(store)
    ended = await store.end_turn(session_id, 1, [], end_id="e0", usage=Usage(), stop_reason=events.END_TURN)
    heard: list[Event] = []
    follower = asyncio.create_task(following(store, session_id, heard))
    try:
        ended = await a_turn(store, session_id, ended, 1)
        await asyncio.wait_for(until(heard, ended.session.next_seq - 1), 5)
        counted = Counted(backend, monkeypatch)
        ended = await a_turn(store, session_id, ended, 2)
        await asyncio.wait_for(until(heard, ended.session.next_seq - 1), 5)
    finally:
        follower.cancel()
    assert (counted.writes, counted.reads) == (3, 1)  # the other read is that of the client's API key
    seen = [(event.seq, event.id, event.payload) for event in heard]
    assert seen == [(event.seq, event.id, event.payload) for event in await log(store, session_id)]
    assert await store.load_transcript(
        {"scope": session_id, "project_key": "-", "session_id": "t", "subpath": ""}
    ) == [{"uuid": "u1", "text": "hi"}, {"uuid": "u2", "text": "hi"}]
