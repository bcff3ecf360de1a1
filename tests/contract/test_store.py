"""The promises of the Store, on both backends."""

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import pytest

from claude_hitl_template.domain import events, models
from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.events import UserInterrupt, UserMessage, UserToolConfirmation
from claude_hitl_template.domain.models import (
    Agent,
    Approval,
    ApprovalState,
    Environment,
    Event,
    Session,
    Usage,
)
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.errors import (
    AlreadyDecided,
    Conflict,
    HitlError,
    InvalidInput,
    NotFound,
    NotWaiting,
    StaleOwner,
    Superseded,
)
from claude_hitl_template.store.base import encode_cursor
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.filters import TimeRange
from claude_hitl_template.store.postgres import PostgresBackend
from claude_hitl_template.store.protocol import NOW, Call, TranscriptKey, own_key
from claude_hitl_template.testing.memory_backend import MemoryBackend
from tests.contract.asking import key_of

KEY, OTHER = "key_1", "key_2"
S = ApprovalState
LS = {"command": "ls -l"}
QUESTIONS = {"questions": [{"question": "Which?", "options": [{"label": "A"}, {"label": "B"}]}]}


# -- short ways to say things


def message(text: str = "go") -> UserMessage:
    return UserMessage.model_validate({"type": "user.message", "content": [{"type": "text", "text": text}]})


def said(call_id: str, result: str = "allow", **more: Any) -> UserToolConfirmation:
    body = {"type": "user.tool_confirmation", "tool_use_id": call_id, "result": result, **more}
    return UserToolConfirmation.model_validate(body)


INTERRUPT = UserInterrupt(type="user.interrupt")


def a_call(call_id: str, given: Mapping[str, Any] = LS, name: str = "Bash", **more: Any) -> Call:
    given = dict(given)
    return Call(call_id=call_id, tool_name=name, input=given, digest=digest(given), verdict="ask", **more)


async def create(store: CoreStore, *initial: UserMessage, key: str = KEY, **more: Any) -> Session:
    body: dict[str, Any] = {"agent": Agent(), "environment": Environment(), "title": None, "metadata": {}}
    return await store.create_session(key, **{**body, "initial": initial, **more})


async def send(store: CoreStore, session_id: str, *said: Any, by: str = "ann", **more: Any) -> list[Event]:
    return await store.send_events(session_id, KEY, said, by=Actor(name=by), **more)


async def log(store: CoreStore, session_id: str, *types: str) -> list[Event]:
    return (await store.list_events(session_id, KEY, limit=1000, types=types)).data


async def begun(store: CoreStore) -> str:
    """Creates a session whose first turn was begun by the owner with epoch 1."""
    session = await create(store, message())
    await store.acquire(session.id, "owner", lease_s=15)
    [queued] = await log(store, session.id, "user.message")
    await store.begin_turn(session.id, 1, queued.id)
    return session.id


def waits_for(stop_reason: Mapping[str, Any] | None, *event_ids: str) -> bool:
    """Whether the session waits for exactly these calls, in any order."""
    found = dict(stop_reason or {})
    return sorted(found.pop("event_ids", [])) == sorted(event_ids) and found == {"type": "requires_action"}


async def ask(
    store: CoreStore, session_id: str, *calls: Call, epoch: int = 1, expires_at: datetime | None = None
) -> list[Approval]:
    drafts = [events.tool_use(c.call_id, c.tool_name, c.input, c.verdict, None) for c in calls]
    return await store.open_calls(session_id, epoch, drafts, calls, cwd="/w", expires_at=expires_at)


async def asking(store: CoreStore, *calls: Call) -> str:
    session_id = await begun(store)
    await ask(store, session_id, *(calls or (a_call("t1"),)))
    return session_id


async def claim(
    store: CoreStore,
    session_id: str,
    call_id: str = "t1",
    given: Mapping[str, Any] = LS,
    *,
    claim_id: str = "c1",
    epoch: int = 1,
) -> Approval:
    return await store.claim(session_id, epoch, call_id, digest(dict(given)), claim_id=claim_id)


async def end(
    store: CoreStore, session_id: str, end_id: str = "end1", epoch: int = 1, **more: Any
) -> Session:
    body: dict[str, Any] = {"usage": Usage(), "stop_reason": events.END_TURN, **more}
    return (await store.end_turn(session_id, epoch, [], end_id=end_id, **body)).session


async def state(store: CoreStore, session_id: str, event_id: str = "t1") -> ApprovalState:
    page = await store.list_approvals(KEY, limit=1000, session_id=session_id)
    [found] = [a for a in page.data if a.event_id == event_id]
    return found.state


def result(call_id: str, *, is_error: bool = False) -> events.Draft:
    return events.tool_result(call_id, events.text_blocks("done"), is_error)


# -- the log


async def test_seq_has_no_gap_and_no_repeat(store: CoreStore):
    session_id = await asking(store, a_call("t1"), a_call("t2", {"command": "pwd"}))
    await asyncio.gather(
        *(send(store, session_id, message(f"m{i}")) for i in range(10)),
        *(store.commit(session_id, 1, [events.agent_message(f"a{i}", "hi")]) for i in range(10)),
        send(store, session_id, said("t1")),
        send(store, session_id, said("t2", "deny")),
    )
    found = await log(store, session_id)
    assert [e.seq for e in found] == list(range(1, len(found) + 1))
    assert len({e.id for e in found}) == len(found)
    assert await store.last_seq(session_id, KEY) == len(found)


async def test_the_same_event_id_is_committed_once(store: CoreStore):
    session_id = await begun(store)
    draft = events.agent_message("a1", "hi")
    await store.commit(session_id, 1, [draft, draft])
    await store.commit(session_id, 1, [draft, events.agent_message("a2", "ho")])
    assert [e.id for e in await log(store, session_id, "agent.message")] == ["a1", "a2"]


async def test_event_ids_are_of_one_session(store: CoreStore):
    one, two = await begun(store), await begun(store)
    for session_id in (one, two):
        await store.commit(session_id, 1, [events.agent_message("a1", "hi")])
        assert [e.id for e in await log(store, session_id, "agent.message")] == ["a1"]


async def test_what_is_sent_together_is_committed_all_or_nothing(store: CoreStore):
    session_id = await asking(store)
    before = await log(store, session_id)
    with pytest.raises(NotWaiting):
        await send(store, session_id, message(), said("t1"), said("never"))
    assert await log(store, session_id) == before
    assert await state(store, session_id) is S.PENDING


async def test_a_decision_and_its_entry_in_the_audit_log_are_committed_together(store: CoreStore):
    session_id = await asking(store, a_call("t1"), a_call("t2", {"command": "pwd"}))
    with pytest.raises(NotWaiting):
        await send(store, session_id, said("t1"), said("never"))
    assert (await store.list_audit(KEY, limit=10)).data == []
    await send(store, session_id, said("t1"))
    await send(store, session_id, said("t2", "deny"))
    second, first = (await store.list_audit(KEY, limit=10)).data
    assert (first.seq, second.seq, second.previous) == (1, 2, first.hash)


async def test_an_event_reads_back_as_it_was_written(store: CoreStore, clock: Any):
    session_id = await begun(store)
    clock.now += timedelta(microseconds=7)
    payload = {"content": [{"type": "text", "text": "ä€\u0000😀"}], "n": 1.5, "none": None}
    await store.commit(session_id, 1, [events.Draft(id="x", type="agent.message", payload=payload)])
    [found] = await log(store, session_id, "agent.message")
    assert (found.payload, found.created_at, found.processed_at) == (payload, clock.now, clock.now)


# -- pages


async def pages(listing: Any, **more: Any) -> list[Any]:
    found, page = [], None
    while True:
        answer = await listing(limit=2, page=page, **more)
        assert len(answer.data) <= 2
        found += answer.data
        page = answer.next_page
        if page is None:
            return found


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_event_pages_hold_each_event_once_in_order(store: CoreStore, order: Any):
    session_id = await begun(store)
    await store.commit(session_id, 1, [events.agent_message(f"a{i}", "hi") for i in range(5)])
    found = await pages(lambda **more: store.list_events(session_id, KEY, **more), order=order)
    assert [e.seq for e in found] == sorted((e.seq for e in found), reverse=order == "desc")
    assert len(found) == await store.last_seq(session_id, KEY)


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_session_pages_hold_each_session_once_in_order(store: CoreStore, clock: Any, order: Any):
    made: list[Session] = []
    for i in range(5):
        made.append(await create(store))
        clock.move(0 if i % 2 else 1)  # some of the same instant
    await create(store, key=OTHER)
    found = await pages(lambda **more: store.list_sessions(KEY, **more), order=order)
    expected = sorted(made, key=lambda s: (s.created_at, s.id), reverse=order == "desc")
    assert [s.id for s in found] == [s.id for s in expected]


async def test_approval_pages_hold_each_approval_once_oldest_first(store: CoreStore, clock: Any):
    session_id = await begun(store)
    for i in range(5):
        await ask(store, session_id, a_call(f"t{i}"))
        clock.move(1)
    found = await pages(lambda **more: store.list_approvals(KEY, **more))
    assert [a.event_id for a in found] == [f"t{i}" for i in range(5)]


async def test_the_last_full_page_has_no_next_one(store: CoreStore):
    for _ in range(2):
        await create(store)
    assert (await store.list_sessions(KEY, limit=2)).next_page is None


@pytest.mark.parametrize(
    "page",
    [
        "", "!", "a", "AAAA", "ä", "%%%", "x" * 500,
        encode_cursor("other", "1"), encode_cursor("events", "-1"), encode_cursor("events", "x"),
        encode_cursor("events", "9" * 40), encode_cursor("sessions", "yesterday", "sesn_1"),
        encode_cursor("approvals", "yesterday", "appr_1"),
    ],
)  # fmt: skip
async def test_a_cursor_that_was_not_handed_out_is_refused(store: CoreStore, page: str):
    session_id = await begun(store)
    for listing in (
        store.list_events(session_id, KEY, limit=2, page=page),
        store.list_sessions(KEY, limit=2, page=page),
        store.list_approvals(KEY, limit=2, page=page),
    ):
        with pytest.raises(InvalidInput) as raised:
            await listing
        assert raised.value.field == "page"


@pytest.mark.parametrize("at", ["2030-01-01", "2030-01-01T00:00:00", "0001-01-01T00:00:00+14:00"])
async def test_a_cursor_with_an_unusable_time_is_refused(store: CoreStore, at: str):
    await asking(store)
    for kind, listing in (("sessions", store.list_sessions), ("approvals", store.list_approvals)):
        with pytest.raises(InvalidInput) as raised:
            await listing(KEY, limit=2, page=encode_cursor(kind, at, "x"))
        assert raised.value.field == "page"


async def test_listings_filter(store: CoreStore, clock: Any):
    early = await create(store)
    clock.move(10)
    late = await create(store, message(), agent=Agent(id="mine"))

    async def ids(**more: Any) -> list[str]:
        return [s.id for s in (await store.list_sessions(KEY, limit=10, **more)).data]

    assert await ids() == [late.id, early.id]
    assert await ids(statuses=["running"]) == [late.id]
    assert await ids(agent_id="mine") == [late.id]
    assert await ids(created=TimeRange(lt=clock.now)) == [early.id]
    assert await ids(created=TimeRange(gte=clock.now)) == [late.id]
    assert await ids(created=TimeRange(gt=clock.now)) == []
    await store.archive_session(early.id, KEY)
    assert await ids() == [late.id]
    assert await ids(include_archived=True) == [late.id, early.id]


async def test_another_keys_session_is_not_found(store: CoreStore):
    session_id = await asking(store)
    [approval] = (await store.list_approvals(KEY, limit=10)).data
    for attempt in (
        store.get_session(session_id, OTHER),
        store.update_session(session_id, OTHER, changes={"title": "mine"}),
        store.archive_session(session_id, OTHER),
        store.delete_session(session_id, OTHER),
        store.send_events(session_id, OTHER, [said("t1")], by=Actor(name="eve")),
        store.list_events(session_id, OTHER, limit=1),
        store.wait_events(session_id, OTHER, 0, timeout_s=0),
        store.last_seq(session_id, OTHER),
        store.get_approval(approval.id, OTHER),
    ):
        with pytest.raises(NotFound):
            await attempt
    assert (await store.list_sessions(OTHER, limit=10)).data == []
    assert (await store.list_approvals(OTHER, limit=10)).data == []
    assert (await store.list_approvals(OTHER, limit=10, session_id=session_id)).data == []
    assert await store.get_approval(approval.id, KEY) == approval


async def test_the_service_itself_sees_and_decides_across_keys(store: CoreStore, clock: Any) -> None:
    mine = await begun(store)
    [approval] = await ask(store, mine, a_call("t1"))
    clock.move(1)
    others = await create(store, message("other"), key=OTHER)
    assert [s.id for s in (await store.list_sessions(None, limit=10, order="asc")).data] == [mine, others.id]
    assert [a.id for a in (await store.list_approvals(None, limit=10)).data] == [approval.id]
    assert await store.get_approval(approval.id, None) == approval
    first = (await store.list_events(others.id, None, limit=1)).data
    assert first == (await store.wait_events(others.id, None, 0, timeout_s=0))[0][:1]
    assert await store.last_seq(others.id, None) == await store.last_seq(others.id, OTHER)

    [decided] = await store.send_events(mine, None, [said("t1")], by=Actor(name="ann of the panel"))
    assert decided.payload["decided_by"] == "ann of the panel"
    with pytest.raises(AlreadyDecided, match="ann of the panel"):
        await send(store, mine, said("t1", "deny"))


async def test_pages_of_all_keys_are_whole(store: CoreStore, clock: Any) -> None:
    made: list[str] = []
    for key in (KEY, OTHER, KEY):
        made.append((await create(store, key=key)).id)
        clock.move(1)
    first = await store.list_sessions(None, limit=2, order="asc")
    second = await store.list_sessions(None, limit=2, page=first.next_page, order="asc")
    assert [session.id for session in (*first.data, *second.data)] == made
    assert second.next_page is None


async def test_the_services_idempotency_keys_are_not_a_clients(store: CoreStore) -> None:
    session = await create(store)
    [mine] = await send(store, session.id, message("one"), idempotency_key="i1")
    again = await store.send_events(
        session.id, None, [message("one")], by=Actor(name="ann"), idempotency_key="i1"
    )
    assert again[0].id != mine.id
    assert again == await store.send_events(
        session.id, None, [message("one")], by=Actor(name="ann"), idempotency_key="i1"
    )


async def test_a_key_is_recorded_once(store: CoreStore):
    first, again = await store.add_key("a", "hash"), await store.add_key("b", "hash")
    assert first == again == key_of(await store.find_identity("hash")) == await store.get_key(first.id)
    assert key_of(await store.find_identity("other")) is None
    with pytest.raises(NotFound):
        await store.get_key("key_other")


# -- creating


async def test_a_session_with_a_first_message_runs(store: CoreStore):
    session = await create(store, message("one"), message("two"))
    assert (session.status, session.parked, session.epoch) == ("running", True, 0)
    assert session == await store.get_session(session.id, KEY)
    queued = await log(store, session.id, "user.message")
    assert [(e.payload["content"][0]["text"], e.processed_at) for e in queued] == [
        ("one", None),
        ("two", None),
    ]
    assert len(await log(store, session.id, "session.status_running")) == 1


async def test_a_session_without_a_message_is_idle(store: CoreStore):
    assert (await create(store)).status == "idle"


async def test_an_idempotency_key_repeats_the_reply(store: CoreStore):
    first = await create(store, message(), idempotency_key="i1")
    assert (await create(store, message(), idempotency_key="i1")).id == first.id
    assert len((await store.list_sessions(KEY, limit=10)).data) == 1
    sent = await send(store, first.id, message(), idempotency_key="i2")
    assert [e.id for e in await send(store, first.id, message(), idempotency_key="i2")] == [
        e.id for e in sent
    ]
    assert len(await log(store, first.id, "user.message")) == 2


async def test_an_idempotency_key_with_another_request_is_a_conflict(store: CoreStore):
    first = await create(store, message(), idempotency_key="i1")
    with pytest.raises(Conflict):
        await create(store, message("other"), idempotency_key="i1")
    with pytest.raises(Conflict):
        await send(store, first.id, message(), idempotency_key="i1")
    assert (await create(store, message("other"), key=OTHER, idempotency_key="i1")).id != first.id


async def test_the_same_idempotency_key_at_once_creates_one_session(store: CoreStore):
    made = await asyncio.gather(*(create(store, message(), idempotency_key="i1") for _ in range(8)))
    assert len({s.id for s in made}) == 1


# -- leases


async def test_the_first_lease_has_epoch_1(store: CoreStore, clock: Any):
    session = await create(store, message())
    owned = await store.acquire(session.id, "one", lease_s=15)
    assert owned.epoch == 1
    assert owned.lease is not None
    assert (owned.lease.epoch, owned.lease.holder) == (1, "one")
    assert owned.lease.expires_at == clock.now + timedelta(seconds=15)


async def test_a_stale_owner_writes_nothing(store: CoreStore):
    session_id = await asking(store)
    await send(store, session_id, said("t1"))
    assert (await store.acquire(session_id, "two", lease_s=15)).epoch == 2
    before = await log(store, session_id)
    [queued] = await log(store, session_id, "user.message")
    key: TranscriptKey = {"scope": session_id, "project_key": "p", "session_id": "s", "subpath": ""}
    for attempt in (
        store.commit(session_id, 1, [events.agent_message("a1", "hi")]),
        ask(store, session_id, a_call("t9")),
        store.begin_turn(session_id, 1, queued.id),
        claim(store, session_id),
        store.hold(session_id, 1, "t1"),
        store.defer(session_id, 1, "t1"),
        store.remind(session_id, 1, []),
        end(store, session_id),
        store.release(session_id, 1),
        store.snapshot(session_id, 1),
        store.find_approval(session_id, 1, "t1"),
        store.wait_session(session_id, 1, 0, timeout_s=0),
        store.append_transcript(key, [{"uuid": "1"}], epoch=1),
        store.commit(session_id, 1, [], transcript=[(key, [{"uuid": "2"}])]),
    ):
        with pytest.raises(StaleOwner):
            await attempt
    await store.drop_lease(session_id, 1)
    assert (await store.get_session(session_id)).lease is not None
    assert await log(store, session_id) == before
    assert await store.load_transcript(key) is None
    assert await state(store, session_id) is S.ALLOWED


async def test_a_lost_owner_is_counted_and_said(store: CoreStore):
    session_id = await begun(store)
    lost = await store.acquire(session_id, "two", lease_s=15)
    assert (lost.recoveries, lost.status) == (1, "running")
    assert [e.type for e in await log(store, session_id)][-2:] == [
        "session.status_rescheduled",
        "session.status_running",
    ]
    assert (await end(store, session_id, epoch=2)).recoveries == 0


async def test_release_is_refused_while_there_is_work(store: CoreStore):
    session_id = await begun(store)
    assert await store.release(session_id, 1) is False
    await end(store, session_id)
    assert await store.release(session_id, 1) is True
    assert await store.release(session_id, 1) is True
    assert (await store.get_session(session_id)).parked


async def test_a_dropped_lease_parks_an_idle_session_and_expires_a_running_ones(store: CoreStore, clock: Any):
    running, idle = await begun(store), await asking(store)
    for session_id in (running, idle):
        await store.drop_lease(session_id, 1)
    lease = (await store.get_session(running)).lease
    assert lease is not None
    assert lease.expires_at < clock.now
    assert (await store.get_session(idle)).parked


async def test_parked_sessions_are_not_supervised(store: CoreStore):
    async def supervised() -> set[str]:
        return {s.id for s in await store.supervised()}

    parked, running, owned = await create(store), await create(store, message()), await asking(store)
    assert await supervised() == {running.id, owned}
    await store.release(owned, 1)
    assert await supervised() == {running.id}
    await send(store, owned, said("t1"))
    assert await supervised() == {running.id, owned}
    await send(store, parked.id, message())
    assert await supervised() == {running.id, owned, parked.id}


async def test_waiting_renews_the_lease(store: CoreStore, clock: Any):
    session_id = await begun(store)
    clock.move(10)
    now = await store.wait_session(session_id, 1, -1, timeout_s=0)
    assert now.session.lease is not None
    assert now.session.lease.expires_at == clock.now + timedelta(seconds=15)


async def test_giving_up_leaves_a_usable_session(store: CoreStore):
    session_id = await begun(store)
    await store.give_up(session_id, "it keeps dying")
    session = await store.get_session(session_id)
    assert (session.status, session.stop_reason, session.lease) == ("idle", events.RETRIES_EXHAUSTED, None)
    await store.give_up(session_id, "it keeps dying")
    assert len(await log(store, session_id, "session.error")) == 1
    await send(store, session_id, message("again"))
    assert (await store.get_session(session_id)).status == "running"


async def test_giving_up_keeps_the_turn_its_decisions_and_the_queue(store: CoreStore):
    session_id = await asking(store)
    await send(store, session_id, message("next"), said("t1"))
    turn = (await store.get_session(session_id)).turn
    await store.give_up(session_id, "no room")
    assert await state(store, session_id) is S.ALLOWED
    await send(store, session_id, message("go on"))
    session = await store.acquire(session_id, "another", lease_s=15)
    assert (session.turn, session.recoveries) == (turn, 0)
    queued = (await store.snapshot(session_id, session.epoch)).queued
    assert [e.payload["content"][0]["text"] for e in queued] == ["next", "go on"]
    await claim(store, session_id, epoch=session.epoch)


async def test_an_interrupt_drops_what_was_given_up(store: CoreStore):
    session_id = await asking(store)
    await send(store, session_id, said("t1"))
    await store.give_up(session_id, "no room")
    await send(store, session_id, INTERRUPT)
    session = await store.get_session(session_id)
    assert (session.status, session.stop_reason, session.turn) == ("idle", events.END_TURN, None)
    assert await state(store, session_id) is S.SUPERSEDED


# -- turns


async def test_a_message_is_taken_up_once(store: CoreStore):
    session_id = await begun(store)
    [event] = await log(store, session_id, "user.message")
    assert event.processed_at is not None
    await store.begin_turn(session_id, 1, event.id)
    now = await store.snapshot(session_id, 1)
    assert (now.turn_event, now.queued) == (event, ())
    await end(store, session_id)
    with pytest.raises(NotWaiting):
        await store.begin_turn(session_id, 1, event.id)


async def test_a_turn_ends_once(store: CoreStore, clock: Any):
    session_id = await begun(store)
    clock.move(3)
    usage = Usage(input_tokens=5, cost_usd=0.5)
    ended = await end(store, session_id, usage=usage)
    assert (ended.status, ended.stop_reason, ended.turn) == ("idle", events.END_TURN, None)
    assert (ended.usage, ended.active_seconds) == (usage, 3.0)
    before = await log(store, session_id)
    assert (await end(store, session_id, usage=usage)).usage == usage
    assert await log(store, session_id) == before


async def test_the_next_message_runs_when_a_turn_ends(store: CoreStore):
    session_id = await begun(store)
    await send(store, session_id, message("next"))
    assert (await end(store, session_id)).status == "running"
    assert [e.payload["content"][0]["text"] for e in (await store.snapshot(session_id, 1)).queued] == ["next"]


async def test_a_turn_broken_off_by_parking_is_not_over(store: CoreStore):
    session_id = await asking(store)
    await store.defer(session_id, 1, "t1")
    ended = await end(store, session_id, usage=Usage(input_tokens=5), how="parked")
    assert (ended.deferred, ended.usage.input_tokens) == ("t1", 5)
    assert ended.turn is not None
    assert await state(store, session_id) is S.PENDING
    assert await store.release(session_id, 1) is True


async def test_a_turn_whose_engine_cannot_work_is_kept(store: CoreStore):
    session_id = await asking(store)
    await store.defer(session_id, 1, "t1")
    await send(store, session_id, said("t1"))
    for _ in range(2):
        broken = await end(store, session_id, how="broken off")
        assert (broken.status, broken.stop_reason) == ("idle", events.RETRIES_EXHAUSTED)
    assert (broken.deferred, await state(store, session_id)) == ("t1", S.ALLOWED)
    assert len(await log(store, session_id, "session.status_idle")) == 2
    await send(store, session_id, message("again"))
    assert (await store.get_session(session_id)).turn == broken.turn


async def test_a_turn_that_was_interrupted_is_over_when_its_engine_cannot_work(store: CoreStore):
    session_id = await begun(store)
    await send(store, session_id, INTERRUPT)
    broken = await end(store, session_id, how="broken off")
    assert (broken.turn, broken.interrupted) == (None, False)


async def test_a_turn_in_which_the_model_failed_leaves_queue_and_held_decisions_for_the_next_message(
    store: CoreStore,
):
    session_id = await asking(store)
    await store.hold(session_id, 1, "t1")
    await send(store, session_id, message("next"), said("t1"))
    [approval] = (await store.snapshot(session_id, 1)).approvals
    await store.remind(session_id, 1, [approval.id])
    failed = await end(store, session_id, stop_reason=events.RETRIES_EXHAUSTED)
    assert (failed.status, failed.stop_reason, failed.turn) == ("idle", events.RETRIES_EXHAUSTED, None)
    await send(store, session_id, message("again"))
    now = await store.snapshot(session_id, 1)
    assert now.session.status == "running"
    assert [(a.state, a.held, a.reminded) for a in now.approvals] == [(S.ALLOWED, True, False)]
    assert [e.payload["content"][0]["text"] for e in now.queued] == ["next", "again"]


# -- a gated call


async def test_asking_idles_the_session_and_names_the_calls(store: CoreStore):
    session_id = await begun(store)
    opened = await ask(store, session_id, a_call("t1"), a_call("t2", {"command": "pwd"}))
    assert [(a.event_id, a.state, a.batch, a.input) for a in opened] == [
        ("t1", S.PENDING, ("t1", "t2"), LS),
        ("t2", S.PENDING, ("t1", "t2"), {"command": "pwd"}),
    ]
    session = await store.get_session(session_id)
    assert session.status == "idle"
    assert waits_for(session.stop_reason, "t1", "t2")
    last = (await log(store, session_id))[-1]
    assert (last.type, last.payload["stop_reason"]) == ("session.status_idle", session.stop_reason)


async def test_calls_asked_together_are_named_in_the_order_they_were_asked(
    store: CoreStore, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(models.time, "time", lambda: 1_900_000_000.0)  # all in one millisecond
    session_id, asked = await begun(store), [f"t{i}" for i in range(9)]
    await ask(store, session_id, *(a_call(t, {"command": t}) for t in asked))
    assert (await store.get_session(session_id)).stop_reason == events.requires_action(asked)
    assert [a.event_id for a in (await store.snapshot(session_id, 1)).approvals] == asked


async def test_opening_the_same_calls_again_has_no_effect(store: CoreStore):
    session_id = await asking(store)
    before = await log(store, session_id)
    [again] = await ask(store, session_id, a_call("t1"))
    assert again.state is S.PENDING
    assert await log(store, session_id) == before
    await send(store, session_id, said("t1"))
    before = await log(store, session_id)
    [again] = await ask(store, session_id, a_call("t1"))
    assert again.state is S.ALLOWED
    assert await log(store, session_id) == before


async def test_a_message_decides_nothing(store: CoreStore):
    session_id = await asking(store)
    [sent] = await send(store, session_id, message("yes, run it"))
    assert sent.processed_at is None
    session = await store.get_session(session_id)
    assert (session.status, session.stop_reason) == ("idle", events.requires_action(["t1"]))
    assert await state(store, session_id) is S.PENDING
    with pytest.raises(NotWaiting):
        await claim(store, session_id)


async def test_deciding_one_of_two_names_the_rest_and_the_other_runs(store: CoreStore):
    session_id = await asking(store, a_call("t1"), a_call("t2", {"command": "pwd"}))
    await send(store, session_id, said("t1"))
    session = await store.get_session(session_id)
    assert (session.status, session.stop_reason) == ("idle", events.requires_action(["t2"]))
    idles = await log(store, session_id, "session.status_idle")
    assert waits_for(idles[0].payload["stop_reason"], "t1", "t2")
    assert waits_for(idles[1].payload["stop_reason"], "t2")
    await send(store, session_id, said("t2", "deny", deny_message="no"))
    session = await store.get_session(session_id)
    assert (session.status, session.stop_reason) == ("running", None)
    assert [await state(store, session_id, t) for t in ("t1", "t2")] == [S.ALLOWED, S.DENIED]


async def test_an_allowed_call_is_claimed_once(store: CoreStore):
    session_id = await asking(store)
    await send(store, session_id, said("t1"))
    with pytest.raises(NotWaiting):
        await claim(store, session_id, given={"command": "rm -r ."})
    first = await claim(store, session_id)
    assert (first.state, first.run_input, first.claimed_epoch) == (S.CLAIMED, LS, 1)
    assert await claim(store, session_id) == first
    with pytest.raises(NotWaiting):
        await claim(store, session_id, claim_id="c2")


async def test_of_many_claims_at_once_one_succeeds(store: CoreStore):
    session_id = await asking(store)
    await send(store, session_id, said("t1"))
    tries = (claim(store, session_id, claim_id=f"c{i}") for i in range(8))
    answers = await asyncio.gather(*tries, return_exceptions=True)
    assert sum(isinstance(a, Approval) for a in answers) == 1
    assert sum(isinstance(a, NotWaiting) for a in answers) == 7


@pytest.mark.parametrize(("is_error", "closed"), [(False, S.SUCCEEDED), (True, S.FAILED)])
async def test_a_result_closes_the_claimed_call(store: CoreStore, is_error: bool, closed: ApprovalState):
    session_id = await asking(store)
    await send(store, session_id, said("t1"))
    await claim(store, session_id)
    for _ in range(2):
        await store.commit(session_id, 1, [result("t1", is_error=is_error)])
    assert await state(store, session_id) is closed
    assert len(await log(store, session_id, "agent.tool_result")) == 1
    with pytest.raises(NotWaiting):
        await claim(store, session_id, claim_id="c2")


async def test_a_result_of_a_denied_call_changes_nothing(store: CoreStore):
    session_id = await asking(store)
    await send(store, session_id, said("t1", "deny"))
    await store.commit(session_id, 1, [result("t1", is_error=True)])
    assert await state(store, session_id) is S.DENIED


async def test_a_claimed_call_without_a_result_becomes_unknown_once(store: CoreStore):
    session_id = await asking(store)
    await send(store, session_id, said("t1"))
    await claim(store, session_id)
    await store.acquire(session_id, "two", lease_s=15)
    await store.acquire(session_id, "three", lease_s=15)
    assert await state(store, session_id) is S.UNKNOWN
    [found] = await log(store, session_id, "agent.tool_result")
    assert (found.payload["tool_use_id"], found.payload["outcome"]) == ("t1", "unknown")
    assert found.payload["is_error"] is True
    with pytest.raises(NotWaiting):
        await claim(store, session_id, claim_id="c2", epoch=3)
    await store.commit(session_id, 3, [result("t1")])
    assert await state(store, session_id) is S.UNKNOWN
    assert len(await log(store, session_id, "agent.tool_result")) == 1


async def test_an_unknown_mcp_call_has_an_mcp_result(store: CoreStore):
    session_id = await asking(store, a_call("t1", {}, "mcp__srv__do"))
    await send(store, session_id, said("t1"))
    await claim(store, session_id, given={})
    await store.acquire(session_id, "two", lease_s=15)
    [found] = await log(store, session_id, "agent.mcp_tool_result")
    assert (found.payload["mcp_tool_use_id"], found.payload["outcome"]) == ("t1", "unknown")


async def test_an_allowed_unclaimed_call_survives_its_owner(store: CoreStore):
    session_id = await asking(store)
    await send(store, session_id, said("t1"))
    await store.acquire(session_id, "two", lease_s=15)
    assert (await claim(store, session_id, epoch=2)).state is S.CLAIMED


async def test_a_standing_rule_allows_without_asking(store: CoreStore):
    session_id = await asking(store, a_call("t0", {"command": "ls -l"}))
    await send(store, session_id, said("t0", remember=True))
    call = a_call("t1", standing_rule="Bash(ls -l)").model_copy(update={"verdict": "allow"})
    [opened] = await ask(store, session_id, call)
    assert opened.state is S.ALLOWED
    assert opened.decision is not None
    assert opened.decision.decided_by == "rule:Bash(ls -l)"
    assert (await store.get_session(session_id)).status == "running"
    assert (await claim(store, session_id)).state is S.CLAIMED
    with pytest.raises(AlreadyDecided):
        await send(store, session_id, said("t1", "deny"))


# -- decisions


async def test_the_same_decision_again_is_the_same_event(store: CoreStore):
    session_id = await asking(store)
    [first] = await send(store, session_id, said("t1"))
    assert (first.payload["tool_use_id"], first.payload["result"]) == ("t1", "allow")
    assert first.payload["decided_by"] == "ann"
    assert await send(store, session_id, said("t1"), by="bob") == [first]
    await claim(store, session_id)
    assert await send(store, session_id, said("t1")) == [first]
    assert len(await log(store, session_id, "user.tool_confirmation")) == 1


@pytest.mark.parametrize(
    "other",
    [said("t1", "deny"), said("t1", updated_input={"command": "ls"}), said("t1", remember=True)],
    ids=["deny", "edit", "remember"],
)
async def test_another_decision_comes_too_late(store: CoreStore, other: UserToolConfirmation):
    session_id = await asking(store)
    await send(store, session_id, said("t1"))
    with pytest.raises(AlreadyDecided):
        await send(store, session_id, other)
    assert (await store.get_session(session_id)).rules == ()


async def test_a_superseded_call_cannot_be_decided(store: CoreStore):
    session_id = await asking(store)
    await send(store, session_id, INTERRUPT)
    for result_ in ("allow", "deny"):
        with pytest.raises(Superseded):
            await send(store, session_id, said("t1", result_))


async def test_what_was_never_asked_cannot_be_decided(store: CoreStore):
    session_id, other = await asking(store), await begun(store)
    with pytest.raises(NotWaiting):
        await send(store, session_id, said("t2"))
    with pytest.raises(NotWaiting):  # another session's call
        await send(store, other, said("t1"))
    assert await state(store, session_id) is S.PENDING


async def test_the_edited_input_is_what_may_run(store: CoreStore):
    session_id = await asking(store)
    edited = {"command": "ls"}
    await send(store, session_id, said("t1", updated_input=edited))
    with pytest.raises(NotWaiting):
        await claim(store, session_id)
    claimed = await claim(store, session_id, given=edited)
    assert (claimed.run_input, claimed.run_digest) == (edited, digest(edited))
    assert (claimed.input, claimed.digest) == (LS, digest(LS))
    [event] = await log(store, session_id, "user.tool_confirmation")
    assert event.payload["updated_input"] == edited


async def test_a_question_needs_its_answers(store: CoreStore):
    session_id = await asking(store, a_call("t1", QUESTIONS, "AskUserQuestion"))
    for more in ({}, {"answers": {}}, {"answers": {"Which?": "A", "Why?": "B"}}, {"answers": {"Which?": ""}}):
        with pytest.raises(InvalidInput):
            await send(store, session_id, said("t1", **more))
    with pytest.raises(InvalidInput):
        await send(store, session_id, said("t1", answers={"Which?": "A"}, remember=True))
    assert await state(store, session_id) is S.PENDING
    await send(store, session_id, said("t1", answers={"Which?": ["A", "B"]}))
    answered = {**QUESTIONS, "answers": {"Which?": "A, B"}}
    assert (await claim(store, session_id, given=answered)).run_input == answered


async def test_only_a_question_takes_answers(store: CoreStore):
    session_id = await asking(store)
    with pytest.raises(InvalidInput) as raised:
        await send(store, session_id, said("t1", answers={"Which?": "A"}))
    assert raised.value.field == "answers"


async def test_remember_records_a_rule(store: CoreStore):
    session_id = await asking(store)
    for _ in range(2):
        await send(store, session_id, said("t1", remember=True))
    [rule] = (await store.get_session(session_id)).rules
    assert (rule.rule, rule.policy) == ("Bash(ls -l)", "always_allow")
    assert rule in (await store.get_session(session_id)).effective_policy().rules


async def test_remember_takes_a_rule_of_the_humans_own(store: CoreStore):
    session_id = await asking(store)
    for wrong in ("Bash(rm:*)", "Bash(", "Read"):
        with pytest.raises(InvalidInput) as raised:
            await send(store, session_id, said("t1", remember=wrong))
        assert raised.value.field == "remember"
    await send(store, session_id, said("t1", remember="Bash(ls:*)"))
    assert [r.rule for r in (await store.get_session(session_id)).rules] == ["Bash(ls:*)"]


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (said("t1", "deny", remember=True), "remember"),
        (said("t1", "deny", updated_input={}), "updated_input"),
        (said("t1", "deny", answers={}), "answers"),
        (said("t1", "allow", deny_message="no"), "deny_message"),
    ],
    ids=["remember", "updated_input", "answers", "deny_message"],
)
async def test_a_decision_that_contradicts_itself_is_refused(
    store: CoreStore, wrong: UserToolConfirmation, field: str
):
    session_id = await asking(store)
    with pytest.raises(InvalidInput) as raised:
        await send(store, session_id, wrong)
    assert raised.value.field == field
    assert await state(store, session_id) is S.PENDING


async def test_a_denied_call_is_never_claimed(store: CoreStore):
    session_id = await asking(store)
    await send(store, session_id, said("t1", "deny", deny_message="no"))
    with pytest.raises(NotWaiting):
        await claim(store, session_id)
    with pytest.raises(AlreadyDecided):
        await send(store, session_id, said("t1"))
    [again] = await ask(store, session_id, a_call("t2"))  # the model may ask again: a human decides again
    assert again.state is S.PENDING


@pytest.mark.takes_long("many people decide at once, on each database")
async def test_of_decisions_at_once_the_first_wins(store: CoreStore, backend: Any):
    rounds = 200 if isinstance(backend, MemoryBackend) else 40
    session_id, chance = await begun(store), random.Random(1)
    kinds: list[dict[str, Any]] = [
        {"result": "allow"},
        {"result": "deny"},
        {"result": "allow", "updated_input": {"command": "ls"}},
    ]
    for i in range(rounds):
        call_id = f"t{i}"
        [opened] = await ask(store, session_id, a_call(call_id))
        picks = [chance.choice(kinds) for _ in range(8)]
        tries = (send(store, session_id, said(call_id, **p), by=f"h{n}") for n, p in enumerate(picks))
        answers = await asyncio.gather(*tries, return_exceptions=True)
        won = [(p, a[0]) for p, a in zip(picks, answers, strict=True) if isinstance(a, list)]
        lost = [(p, a) for p, a in zip(picks, answers, strict=True) if not isinstance(a, list)]
        winner = won[0][0]
        assert len({event.id for _, event in won}) == 1
        assert all(p == winner for p, _ in won)
        assert all(p != winner and type(a) is AlreadyDecided for p, a in lost)
        expected = S.DENIED if winner["result"] == "deny" else S.ALLOWED
        assert (await store.get_approval(opened.id, KEY)).state is expected
    assert len(await log(store, session_id, "user.tool_confirmation")) == rounds


# -- held calls


async def held(store: CoreStore, *said_: UserToolConfirmation) -> str:
    """Creates a session whose call t1 was held at a turn's end, and decided after it."""
    session_id = await asking(store)
    await store.hold(session_id, 1, "t1")
    await end(store, session_id)
    for decision in said_:
        await send(store, session_id, decision)
    return session_id


async def test_a_held_call_waits_on_after_its_turn(store: CoreStore):
    session_id = await held(store)
    session = await store.get_session(session_id)
    assert (session.status, session.stop_reason) == ("idle", events.requires_action(["t1"]))
    assert await state(store, session_id) is S.PENDING


async def test_a_call_that_is_not_held_is_superseded_at_its_turns_end(store: CoreStore):
    session_id = await asking(store)
    assert (await end(store, session_id)).stop_reason == events.END_TURN
    assert await state(store, session_id) is S.SUPERSEDED


async def test_an_identical_call_takes_over_an_allowed_held_one(store: CoreStore):
    session_id = await held(store, said("t1"))
    assert (await store.get_session(session_id)).status == "running"
    [adopted] = await ask(store, session_id, a_call("t2"))
    assert (adopted.event_id, adopted.call_id, adopted.state) == ("t1", "t2", S.ALLOWED)
    assert (await store.get_session(session_id)).status == "running"
    with pytest.raises(NotWaiting):
        await claim(store, session_id, "t1")
    assert (await claim(store, session_id, "t2")).state is S.CLAIMED
    with pytest.raises(NotWaiting):
        await claim(store, session_id, "t2", claim_id="c2")
    [third] = await ask(store, session_id, a_call("t3"))  # one approval, one run
    assert (third.event_id, third.state) == ("t3", S.PENDING)
    await store.commit(session_id, 1, [result("t2")])
    assert await state(store, session_id) is S.SUCCEEDED


async def test_an_identical_call_takes_over_a_pending_held_one(store: CoreStore):
    session_id = await held(store)
    [adopted] = await ask(store, session_id, a_call("t2"))
    assert (adopted.event_id, adopted.call_id, adopted.state) == ("t1", "t2", S.PENDING)
    assert (await store.get_session(session_id)).stop_reason == events.requires_action(["t1"])
    await send(store, session_id, said("t1"))
    assert (await claim(store, session_id, "t2")).state is S.CLAIMED


async def test_two_identical_calls_do_not_share_one_approval(store: CoreStore):
    session_id = await held(store, said("t1"))
    first, second = await ask(store, session_id, a_call("t2"), a_call("t3"))
    assert (first.state, second.state) == (S.ALLOWED, S.PENDING)
    assert first.id != second.id


async def test_an_edited_held_call_runs_as_edited(store: CoreStore):
    edited = {"command": "ls"}
    session_id = await held(store, said("t1", updated_input=edited))
    await ask(store, session_id, a_call("t2"))
    assert (await claim(store, session_id, "t2", edited)).run_input == edited


@pytest.mark.parametrize(
    "other", [a_call("t2", {"command": "ls -la"}), a_call("t2", LS, "Monitor")], ids=["input", "tool"]
)
async def test_another_call_takes_nothing_over(store: CoreStore, other: Call):
    session_id = await held(store, said("t1"))
    [opened] = await ask(store, session_id, other)
    assert (opened.event_id, opened.state) == ("t2", S.PENDING)
    assert await state(store, session_id, "t1") is S.ALLOWED


async def test_a_call_that_is_not_held_is_not_taken_over(store: CoreStore):
    session_id = await asking(store)
    await send(store, session_id, said("t1"))
    [opened] = await ask(store, session_id, a_call("t2"))
    assert opened.state is S.PENDING


async def test_what_a_dead_owner_reminded_of_is_said_again_by_the_next(store: CoreStore):
    session_id = await held(store, said("t1"))
    [approval] = (await store.snapshot(session_id, 1)).approvals
    await store.remind(session_id, 1, [approval.id])
    epoch = (await store.acquire(session_id, "another owner", lease_s=60)).epoch
    assert [(a.held, a.reminded) for a in (await store.snapshot(session_id, epoch)).approvals] == [
        (True, False)
    ]
    assert (await end(store, session_id, "end2", epoch=epoch)).status == "running"
    assert await state(store, session_id) is S.ALLOWED


async def test_a_call_that_was_issued_after_a_reminder_and_lost_is_reminded_of_again(store: CoreStore):
    """A turn that a reminder began has no message."""
    session_id = await held(store, said("t1"))
    [approval] = (await store.snapshot(session_id, 1)).approvals
    await store.remind(session_id, 1, [approval.id])
    [adopted] = await ask(store, session_id, a_call("t2"))
    assert (adopted.id, adopted.held) == (approval.id, False)
    epoch = (await store.acquire(session_id, "another owner", lease_s=60)).epoch
    assert [a.call_id for a in await store.lost_calls(session_id, epoch)] == ["t2"]
    await store.hold(session_id, epoch, "t2")
    [found] = (await store.snapshot(session_id, epoch)).approvals
    assert (found.state, found.held, found.reminded) == (S.ALLOWED, True, False)


async def test_a_held_call_reminded_of_in_vain_is_superseded(store: CoreStore):
    session_id = await held(store, said("t1"))
    [approval] = (await store.snapshot(session_id, 1)).approvals
    await store.remind(session_id, 1, [approval.id])
    assert (await end(store, session_id, "end2")).status == "idle"
    assert await state(store, session_id) is S.SUPERSEDED


# -- interrupts


async def test_interrupting_an_idle_session_changes_nothing_but_the_log(store: CoreStore):
    session_id = await begun(store)
    await end(store, session_id)
    before = await store.get_session(session_id)
    [sent] = await send(store, session_id, INTERRUPT)
    after = await store.get_session(session_id)
    assert (after.status, after.stop_reason, after.interrupted) == (before.status, before.stop_reason, False)
    assert (await log(store, session_id))[-1] == sent


async def test_interrupting_before_a_turn_begins_drops_its_message(store: CoreStore):
    session = await create(store, message("one"), message("two"))
    await send(store, session.id, INTERRUPT)
    await store.acquire(session.id, "owner", lease_s=15)
    now = await store.snapshot(session.id, 1)
    assert [e.payload["content"][0]["text"] for e in now.queued] == ["two"]
    assert now.session.status == "running"
    await send(store, session.id, INTERRUPT)
    now = await store.snapshot(session.id, 1)
    assert (now.queued, now.session.status, now.session.interrupted) == ((), "idle", False)


async def test_a_message_to_an_owner_that_rests_begins_its_turn(store: CoreStore):
    session_id = await begun(store)
    await end(store, session_id)
    [first, second] = await send(store, session_id, message("first"), message("second"))
    assert (first.processed_at is None, second.processed_at is None) == (False, True)
    now = await store.snapshot(session_id, 1)
    assert (now.session.status, now.turn_event, now.queued) == ("running", first, (second,))
    await store.begin_turn(session_id, 1, first.id)  # an owner that was started for it may say so
    ended = await end(store, session_id, end_id="another")
    assert (ended.status, ended.turn) == ("running", None)
    await store.begin_turn(session_id, 1, second.id)


async def test_an_interrupt_with_a_message_to_an_owner_that_rests_drops_the_message(store: CoreStore):
    session_id = await begun(store)
    await end(store, session_id)
    [said, _] = await send(store, session_id, message("first"), INTERRUPT)
    now = await store.snapshot(session_id, 1)
    assert (now.session.turn, now.session.interrupted, now.queued) == (said.id, True, ())
    ended = await end(store, session_id, end_id="another")
    assert (ended.status, ended.stop_reason, ended.turn) == ("idle", events.END_TURN, None)


async def test_a_message_after_an_interrupt_waits_until_the_owner_ended_the_turn(store: CoreStore):
    session_id = await asking(store)
    await send(store, session_id, INTERRUPT)
    [sent] = await send(store, session_id, message("instead"))
    now = await store.snapshot(session_id, 1)
    assert (now.session.status, now.session.interrupted, now.queued) == ("running", True, (sent,))
    ended = await end(store, session_id)
    assert (ended.status, ended.turn, ended.interrupted) == ("running", None, False)
    assert (await store.snapshot(session_id, 1)).queued == (sent,)


async def test_a_message_waits_until_the_call_of_a_dropped_turn_was_denied(store: CoreStore):
    session_id = await asking(store)
    await store.defer(session_id, 1, "t1")
    await end(store, session_id, how="parked")
    await send(store, session_id, said("t1"))
    await send(store, session_id, INTERRUPT)
    ended = await end(store, session_id, end_id="dropped", how="dropped")
    assert (ended.status, ended.turn, ended.interrupted, ended.deferred) == ("idle", None, False, "t1")
    [sent] = await send(store, session_id, message("instead"))
    assert (await store.snapshot(session_id, 1)).queued == (sent,)
    ended = await end(store, session_id, end_id="denied")
    assert (ended.status, ended.turn, ended.deferred) == ("running", None, None)
    assert (await store.snapshot(session_id, 1)).queued == (sent,)


async def test_interrupting_a_turn_is_left_to_its_owner(store: CoreStore):
    session_id = await begun(store)
    await send(store, session_id, INTERRUPT)
    session = await store.get_session(session_id)
    assert (session.status, session.interrupted) == ("running", True)
    ended = await end(store, session_id)
    assert (ended.status, ended.stop_reason, ended.interrupted) == ("idle", events.END_TURN, False)


async def test_interrupting_supersedes_what_waits(store: CoreStore):
    session_id = await asking(store, a_call("t1"), a_call("t2", {"command": "pwd"}))
    await send(store, session_id, said("t1"))
    await send(store, session_id, INTERRUPT)
    assert [await state(store, session_id, t) for t in ("t1", "t2")] == [S.SUPERSEDED, S.SUPERSEDED]
    session = await store.get_session(session_id)
    assert (session.status, session.stop_reason) == ("idle", events.END_TURN)
    with pytest.raises(NotWaiting):
        await claim(store, session_id)
    before = await log(store, session_id, "session.status_idle")
    assert (await end(store, session_id)).interrupted is False
    assert await log(store, session_id, "session.status_idle") == before


async def test_interrupting_a_parked_session_that_waits_goes_on_with_the_queue(store: CoreStore):
    session_id = await asking(store)
    await end(store, session_id, how="parked")
    await store.release(session_id, 1)
    await send(store, session_id, message("instead"))
    await send(store, session_id, INTERRUPT)
    session = await store.get_session(session_id)
    assert (session.status, session.turn, session.interrupted) == ("running", None, False)


async def test_nothing_is_claimed_once_interrupted(store: CoreStore):
    session_id = await asking(store)
    await send(store, session_id, said("t1"))
    await send(store, session_id, INTERRUPT)
    with pytest.raises(NotWaiting):
        await claim(store, session_id)
    await ask(store, session_id, a_call("t2"))
    await send(store, session_id, said("t2"))
    with pytest.raises(NotWaiting):
        await claim(store, session_id, "t2")


async def test_interrupting_does_not_unclaim(store: CoreStore):
    session_id = await asking(store)
    await send(store, session_id, said("t1"))
    await claim(store, session_id)
    await send(store, session_id, INTERRUPT)
    assert await state(store, session_id) is S.CLAIMED
    await store.commit(session_id, 1, [result("t1")])
    assert await state(store, session_id) is S.SUCCEEDED


# -- archive, delete, update


async def test_archiving_supersedes_what_waits_and_makes_read_only(store: CoreStore, clock: Any):
    session_id = await asking(store)
    archived = await store.archive_session(session_id, KEY)
    assert (archived.status, archived.archived_at) == ("terminated", clock.now)
    assert await state(store, session_id) is S.SUPERSEDED
    before = await log(store, session_id)
    assert before[-1].type == "session.status_terminated"
    for attempt in (
        send(store, session_id, message()),
        send(store, session_id, INTERRUPT),
        send(store, session_id, said("t1")),
        store.update_session(session_id, KEY, changes={"title": "x"}),
    ):
        with pytest.raises(Conflict):
            await attempt
    clock.move(1)
    assert (await store.archive_session(session_id, KEY)).archived_at == archived.archived_at
    assert await log(store, session_id) == before


async def test_archiving_is_refused_while_running(store: CoreStore):
    session_id = await begun(store)
    with pytest.raises(Conflict):
        await store.archive_session(session_id, KEY)
    assert (await store.get_session(session_id)).archived_at is None


async def test_the_owner_of_an_archived_session_is_told_to_stop(store: CoreStore):
    session_id = await asking(store)
    await send(store, session_id, message("queued behind"))
    await store.archive_session(session_id, KEY)
    with pytest.raises(StaleOwner):
        await end(store, session_id)
    session = await store.get_session(session_id)
    assert (session.status, session.turn, session.lease) == ("terminated", None, None)
    assert await store.release(session_id, 1) is True


async def test_giving_up_an_archived_session_leaves_it_archived(store: CoreStore):
    session_id = await asking(store)
    await store.archive_session(session_id, KEY)
    await store.give_up(session_id, "its owner died")
    session = await store.get_session(session_id)
    assert (session.status, session.lease) == ("terminated", None)


async def test_deleting_removes_everything(store: CoreStore):
    session_id, other = await asking(store), await asking(store)
    key: TranscriptKey = {"scope": session_id, "project_key": "p", "session_id": "s", "subpath": ""}
    await store.append_transcript(key, [{"uuid": "1"}], epoch=1)
    await store.delete_session(session_id, KEY)
    for attempt in (store.get_session(session_id), store.list_events(session_id, KEY, limit=1)):
        with pytest.raises(NotFound):
            await attempt
    with pytest.raises(NotFound):
        await store.delete_session(session_id, KEY)
    with pytest.raises(StaleOwner):
        await store.commit(session_id, 1, [])
    assert [a.session_id for a in (await store.list_approvals(KEY, limit=10)).data] == [other]
    assert await store.load_transcript(key) is None
    assert session_id not in {s.id for s in await store.supervised()}


async def test_deleting_is_refused_while_running(store: CoreStore):
    session_id = await begun(store)
    with pytest.raises(Conflict):
        await store.delete_session(session_id, KEY)
    assert await log(store, session_id)


async def test_deleting_wakes_who_waits_for_events(store: CoreStore):
    session_id = await asking(store)
    last = await store.last_seq(session_id, KEY)
    waiting = asyncio.create_task(store.wait_events(session_id, KEY, last, timeout_s=10))
    await asyncio.sleep(0.05)
    await store.delete_session(session_id, KEY)
    with pytest.raises(NotFound):
        await asyncio.wait_for(waiting, 5)


async def test_an_update_patches_and_is_said(store: CoreStore):
    session = await create(store, metadata={"a": "1", "b": "2"}, title="old")
    changes = {"title": "new", "metadata": {"a": None, "c": "3"}}
    for _ in range(2):
        updated = await store.update_session(session.id, KEY, changes=changes)
        assert (updated.title, updated.metadata) == ("new", {"b": "2", "c": "3"})
    [event] = await log(store, session.id, "session.updated")
    assert event.payload == {"title": "new", "metadata": {"b": "2", "c": "3"}}
    assert (await store.update_session(session.id, KEY, changes={"title": None})).title is None


async def test_metadata_has_a_limit(store: CoreStore):
    session = await create(store)
    changes = {"metadata": {str(i): "x" for i in range(17)}}
    with pytest.raises(InvalidInput) as raised:
        await store.update_session(session.id, KEY, changes=changes)
    assert raised.value.field == "metadata"


# -- time


async def test_what_is_due_expires_and_nothing_else(store: CoreStore, clock: Any):
    session_id = await begun(store)
    await ask(store, session_id, a_call("t1"), expires_at=clock.now + timedelta(seconds=10))
    await ask(store, session_id, a_call("t2"), expires_at=clock.now + timedelta(seconds=20))
    await ask(store, session_id, a_call("t3"))
    assert await store.expire_due() == 0
    clock.move(10)
    assert await store.expire_due() == 1
    assert await store.expire_due() == 0
    assert [await state(store, session_id, t) for t in ("t1", "t2", "t3")] == [
        S.EXPIRED,
        S.PENDING,
        S.PENDING,
    ]
    assert waits_for((await store.get_session(session_id)).stop_reason, "t2", "t3")
    for result_ in ("allow", "deny"):
        with pytest.raises(Superseded):
            await send(store, session_id, said("t1", result_))
    with pytest.raises(NotWaiting):
        await claim(store, session_id)


async def test_the_last_expiry_lets_the_session_go_on(store: CoreStore, clock: Any):
    session_id = await begun(store)
    await ask(store, session_id, a_call("t1"), expires_at=clock.now)
    assert await store.expire_due() == 1
    assert (await store.get_session(session_id)).status == "running"


async def test_a_decided_call_does_not_expire(store: CoreStore, clock: Any):
    session_id = await begun(store)
    await ask(store, session_id, a_call("t1"), expires_at=clock.now)
    await send(store, session_id, said("t1"))
    assert await store.expire_due() == 0
    assert await state(store, session_id) is S.ALLOWED


# -- waiting


async def test_waiting_for_events_ends_at_a_commit(store: CoreStore):
    session_id = await begun(store)
    last = await store.last_seq(session_id, KEY)
    waiting = asyncio.create_task(store.wait_events(session_id, KEY, last, timeout_s=30))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await store.commit(session_id, 1, [events.agent_message("a1", "hi")])
    found, deltas, _ = await asyncio.wait_for(waiting, 5)
    assert ([e.id for e in found], deltas) == (["a1"], [])


async def test_waiting_for_events_returns_what_is_there(store: CoreStore):
    session_id = await begun(store)
    found, _, _ = await asyncio.wait_for(store.wait_events(session_id, KEY, 0, timeout_s=30), 5)
    assert found == await log(store, session_id)


async def test_waiting_for_events_ends_empty_in_time(store: CoreStore):
    session_id = await begun(store)
    last, start = await store.last_seq(session_id, KEY), time.monotonic()
    assert await store.wait_events(session_id, KEY, last, timeout_s=0.05) == ([], [], 0)
    assert 0.04 < time.monotonic() - start < 5


async def test_previews_reach_only_who_asks_and_none_is_lost_between_two_calls(
    store: CoreStore, backend: object
):
    session_id = await begun(store)
    wanted = await store.preview(session_id, 1, [{"d": 0}])
    assert wanted is False or isinstance(backend, PostgresBackend)  # streams of other ledgers are not known
    last = await store.last_seq(session_id, KEY)
    waiting = asyncio.create_task(store.wait_events(session_id, KEY, last, timeout_s=30, previews=NOW))
    without = asyncio.create_task(store.wait_events(session_id, KEY, last, timeout_s=0.3))
    await asyncio.sleep(0.05)
    assert await store.preview(session_id, 1, [{"d": 1}, {"d": 2}])
    found, deltas, position = await asyncio.wait_for(waiting, 5)
    assert (found, deltas) == ([], [{"d": 1}, {"d": 2}])
    await store.preview(session_id, 1, [{"d": 3}])
    again = store.wait_events(session_id, KEY, last, timeout_s=30, previews=position)
    assert (await asyncio.wait_for(again, 5))[1] == [{"d": 3}]
    assert (await without)[:2] == ([], [])
    await store.end_turn(session_id, 1, [], end_id="e", usage=Usage(), stop_reason=events.END_TURN)
    await store.release(session_id, 1)
    assert (await store.wait_events(session_id, KEY, last + 9, timeout_s=0, previews=0))[1] == []


async def test_a_decision_wakes_the_owner(store: CoreStore):
    session_id = await asking(store)
    revision = (await store.snapshot(session_id, 1)).session.revision
    waiting = asyncio.create_task(store.wait_session(session_id, 1, revision, timeout_s=30))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await send(store, session_id, said("t1"))
    found = await asyncio.wait_for(waiting, 5)
    assert [a.state for a in found.approvals] == [S.ALLOWED]
    assert found.session.revision != revision


async def test_an_owner_that_is_replaced_hears_of_it(store: CoreStore):
    session_id = await asking(store)
    revision = (await store.snapshot(session_id, 1)).session.revision

    async def wait() -> None:
        while True:  # as an owner does: a late notification of what was there before ends a wait
            await store.wait_session(session_id, 1, revision, timeout_s=30)

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0.05)
    await store.acquire(session_id, "two", lease_s=15)
    with pytest.raises(StaleOwner):
        await asyncio.wait_for(waiting, 5)


async def quiet(store: CoreStore) -> int:
    """Returns the version of the supervised sessions, once no notification of it is pending."""
    version = await store.wait_supervised(-1, timeout_s=0.01)
    while (newer := await store.wait_supervised(version, timeout_s=0.2)) != version:
        version = newer
    return version


async def test_new_work_wakes_the_supervisor(store: CoreStore):
    session = await create(store)
    version = await quiet(store)
    waiting = asyncio.create_task(store.wait_supervised(version, timeout_s=30))
    await asyncio.sleep(0.05)
    await send(store, session.id, message())
    assert await asyncio.wait_for(waiting, 5) != version


async def test_a_read_sees_one_state(store: CoreStore, backend: Any):
    session_id = await begun(store)
    async with backend.begin(write=False) as tx:
        seen = await tx.session(session_id)
        await store.commit(session_id, 1, [events.agent_message("a1", "hi")])
        known: Sequence[Event] = await tx.events(
            session_id, after=None, limit=1000, order="asc", types=(), created=TimeRange()
        )
    assert known[-1].seq == seen.next_seq - 1


async def test_an_error_undoes_the_whole_write(store: CoreStore, backend: Any):
    session_id = await begun(store)
    before = await store.get_session(session_id)

    async def fail_halfway() -> None:
        async with backend.begin(write=True) as tx:
            await tx.put_session(before.but(title="half"))
            raise HitlError("no")

    with pytest.raises(HitlError):
        await fail_halfway()
    assert await store.get_session(session_id) == before
    await store.ping()


# -- what is kept, and how long


async def rested(store: CoreStore) -> str:
    """Creates a session that is parked at the end of its turn."""
    session_id = await begun(store)
    await end(store, session_id)
    assert await store.release(session_id, 1)
    return session_id


async def test_old_sessions_at_rest_or_archived_are_deleted_with_all_that_is_theirs(
    store: CoreStore, clock: Any
):
    at_rest, archived = await rested(store), await rested(store)
    await store.archive_session(archived, KEY)
    key = TranscriptKey(scope=at_rest, project_key="-", session_id="s", subpath="")
    await store.append_transcript(key, [{"uuid": "1"}])
    clock.move(100)
    assert await store.retire(clock.now - timedelta(seconds=200)) == []
    fresh = await rested(store)
    assert sorted(await store.retire(clock.now - timedelta(seconds=50))) == sorted([at_rest, archived])
    for gone in (at_rest, archived):
        with pytest.raises(NotFound):
            await store.get_session(gone)
        assert (await store.list_approvals(KEY, limit=10, session_id=gone)).data == []
    assert await store.load_transcript(key) is None
    assert (await store.get_session(fresh)).id == fresh


async def test_what_waits_is_never_too_old(store: CoreStore, clock: Any):
    asked = await asking(store)
    await end(store, asked, how="parked")
    await store.release(asked, 1)
    held_undecided, held_decided = await held(store), await held(store, said("t1"))
    hot, broken, unbegun = await begun(store), await begun(store), (await create(store, message())).id
    await end(store, hot)
    await store.give_up(broken, "no room")
    clock.move(10**8)
    assert await store.retire(clock.now - timedelta(days=1)) == []
    for kept in (asked, held_undecided, held_decided, hot, broken, unbegun):
        assert (await store.get_session(kept)).id == kept


async def test_a_session_that_never_ran_grows_old_like_others(store: CoreStore, clock: Any):
    session = await create(store)
    clock.move(1000)
    young = await create(store)
    assert await store.retire(clock.now - timedelta(seconds=500)) == [session.id]
    assert (await store.get_session(young.id)).id == young.id


@pytest.mark.parametrize(
    ("idempotency_key", "kept"),
    [("a client's", timedelta(days=2)), (own_key(), timedelta(minutes=10))],
    ids=["of a client", "of our own"],
)
async def test_what_a_request_was_answered_is_kept_for_a_time_and_then_forgotten(
    store: CoreStore, clock: Any, idempotency_key: str, kept: timedelta
):
    first = await create(store, idempotency_key=idempotency_key)
    clock.now += kept - timedelta(seconds=1)
    assert await store.sweep_replies() == 0
    assert (await create(store, idempotency_key=idempotency_key)).id == first.id
    clock.now += timedelta(seconds=2)
    assert await store.sweep_replies() == 1
    assert (await create(store, idempotency_key=idempotency_key)).id != first.id


async def test_without_an_idempotency_key_nothing_is_kept_of_a_request(store: CoreStore, clock: Any):
    session = await create(store)
    await send(store, session.id, message())
    clock.now += timedelta(days=9)
    assert await store.sweep_replies() == 0


async def test_what_requests_were_answered_goes_with_their_session(store: CoreStore, clock: Any):
    session = await create(store, idempotency_key="i1")
    await send(store, session.id, message(), INTERRUPT, idempotency_key="i2")
    await store.delete_session(session.id, KEY)
    clock.now += timedelta(days=9)
    assert await store.sweep_replies() == 0
    assert (await create(store, idempotency_key="i1")).id != session.id


async def test_a_session_that_is_interrupted_waits_for_room_no_more(store: CoreStore):
    session = await create(store, message())
    await store.tell_waiting(session.id, session.epoch, "no room")
    assert (await store.get_session(session.id)).waits_for_room
    await send(store, session.id, INTERRUPT)
    assert not (await store.get_session(session.id)).waits_for_room
    await store.tell_waiting(session.id, session.epoch, "no room")  # the supervisor had not heard of it yet
    assert not (await store.get_session(session.id)).waits_for_room


async def test_a_session_keeps_the_first_words_that_were_said_in_it(store: CoreStore):
    session = await create(store)
    assert session.first_words is None
    await send(store, session.id, message("first " * 100))
    await send(store, session.id, message("second"))
    assert (await store.get_session(session.id)).first_words == ("first " * 100)[:120]


async def test_a_page_ends_where_its_entries_are_large_and_the_next_one_goes_on(store: CoreStore):
    session = await create(store)
    texts = [f"{number} {'x' * 900_000}" for number in range(30)]
    for text in texts:
        await send(store, session.id, message(text), INTERRUPT)
    listed: list[Event] = []
    page = None
    while page is None or page.next_page:
        page = await store.list_events(
            session.id, KEY, limit=1000, page=page and page.next_page, types=["user.message"]
        )
        assert 1 <= len(page.data) <= 10
        listed += page.data
    assert [e.payload["content"][0]["text"] for e in listed] == texts
    heard: list[Event] = []
    while len(heard) < await store.last_seq(session.id, KEY):
        found, _, _ = await store.wait_events(session.id, KEY, len(heard), timeout_s=0)
        assert sum(e.type == "user.message" for e in found) <= 10
        heard += found
    assert [e for e in heard if e.type == "user.message"] == listed


async def test_a_session_that_is_used_again_is_not_old(store: CoreStore, clock: Any):
    session_id = await rested(store)
    clock.move(1000)
    await store.update_session(session_id, KEY, changes={"title": "used"})
    assert await store.retire(clock.now - timedelta(seconds=500)) == []


# -- what comes from outside, on every database

HOSTILE = ["\0", "a\0b", "'; drop table sessions; --", "%", "é" * 250, "😀", "\ufffd", ""]


@pytest.mark.parametrize("text", HOSTILE)
async def test_hostile_names_find_nothing_and_break_nothing(store: CoreStore, text: str):
    session_id = await asking(store)
    for reading in (store.get_session(text), store.get_approval(text, KEY), store.get_key(text)):
        with pytest.raises(NotFound):
            await reading
    with pytest.raises(NotWaiting):
        await send(store, session_id, said(text or "none"))
    assert key_of(await store.find_identity(text)) is None
    assert (await store.list_sessions(text, limit=5)).data == []
    assert (await store.list_sessions(KEY, limit=5, agent_id=text)).data == []
    assert await log(store, session_id, text) == []
    assert (
        await store.load_transcript(
            TranscriptKey(scope=text, project_key=text, session_id=text, subpath=text)
        )
        is None
    )


@pytest.mark.parametrize("text", HOSTILE)
async def test_hostile_text_is_kept_as_it_is(store: CoreStore, text: str):
    first = await create(
        store, message(text or " "), title=text, metadata={"k": text}, idempotency_key=text or "e"
    )
    again = await create(
        store, message(text or " "), title=text, metadata={"k": text}, idempotency_key=text or "e"
    )
    assert again == first
    found = await store.get_session(first.id)
    assert (found.title, found.metadata) == (text, {"k": text})
    key = TranscriptKey(scope=first.id, project_key=text, session_id=text, subpath=text)
    await store.append_transcript(key, [{"uuid": text or None, "text": text}])
    assert await store.load_transcript(key) == [{"uuid": text or None, "text": text}]
    await store.acquire(first.id, "owner", lease_s=15)
    call_id = f"t{text}"
    await ask(store, first.id, a_call(call_id, {"command": text}))
    await send(store, first.id, said(call_id))
    claimed = await claim(store, first.id, call_id, {"command": text})
    assert claimed.run_input == {"command": text}


# -- a clock that jumps

JUMPS = [timedelta(hours=1), timedelta(hours=-1), timedelta(days=35), timedelta(days=-35)]


@pytest.mark.parametrize("jump", JUMPS, ids=str)
async def test_a_lease_is_renewed_before_and_after_a_jump_of_the_clock_and_stays_one_owner_s(
    store: CoreStore, clock: Any, jump: timedelta
):
    session_id = await begun(store)
    for jumped in (jump, -jump):
        clock.now += jumped
        found = (await store.wait_session(session_id, 1, -1, timeout_s=0)).session
        assert found.lease is not None
        assert (found.epoch, found.lease.holder) == (1, "owner")
        assert found.lease.expires_at == clock.now + timedelta(seconds=15)
        clock.move(4)
        await store.wait_session(session_id, 1, -1, timeout_s=0)
    clock.now += jump
    assert (await store.acquire(session_id, "two", lease_s=15)).epoch == 2
    with pytest.raises(StaleOwner):
        await store.wait_session(session_id, 1, -1, timeout_s=0)


@pytest.mark.parametrize("jump", JUMPS, ids=str)
async def test_after_a_dropped_lease_the_same_holder_is_another_owner_whatever_the_clock_says(
    store: CoreStore, clock: Any, jump: timedelta
):
    session_id = await begun(store)
    await store.drop_lease(session_id, 1)
    clock.now += jump
    assert (await store.acquire(session_id, "owner", lease_s=15)).epoch == 2


@pytest.mark.parametrize("jump", JUMPS, ids=str)
async def test_events_stay_in_their_order_over_a_jump_of_the_clock(
    store: CoreStore, clock: Any, jump: timedelta
):
    session_id = await begun(store)
    said_: list[str] = []
    for number, jumped in enumerate((timedelta(), jump, -jump, jump)):
        clock.now += jumped
        said_.append(f"a{number}")
        await store.commit(session_id, 1, [events.agent_message(said_[-1], "hi")])
    found = await log(store, session_id)
    assert [e.seq for e in found] == list(range(1, len(found) + 1))
    assert [e.id for e in found if e.type == "agent.message"] == said_
    after = await store.wait_events(session_id, KEY, found[-3].seq, timeout_s=0)
    assert [e.id for e in after[0]] == said_[-2:]


@pytest.mark.parametrize("jump", JUMPS, ids=str)
async def test_what_was_asked_is_taken_up_by_the_next_owner_whatever_the_clock_said(
    store: CoreStore, clock: Any, jump: timedelta
):
    session_id = await begun(store)
    clock.now += jump
    await ask(store, session_id, a_call("t1"))
    await send(store, session_id, said("t1"))
    epoch = (await store.acquire(session_id, "two", lease_s=15)).epoch
    assert [a.call_id for a in await store.lost_calls(session_id, epoch)] == ["t1"]
    assert (await claim(store, session_id, epoch=epoch)).state is S.CLAIMED


async def test_a_jump_that_is_taken_back_before_anything_expired_changes_nothing(
    store: CoreStore, clock: Any
):
    session_id = await begun(store)
    await ask(store, session_id, a_call("t1"), expires_at=clock.now + timedelta(days=30))
    clock.now += timedelta(days=35)
    with pytest.raises(Superseded):  # refused, and kept: what the clock says may be so
        await send(store, session_id, said("t1"))
    clock.now -= timedelta(days=35)
    assert await store.expire_due() == 0
    await send(store, session_id, said("t1"))
    assert await state(store, session_id) is S.ALLOWED


async def test_a_decision_after_the_expiry_is_none_even_if_nobody_noticed_the_expiry_yet(
    store: CoreStore, clock: Any
):
    session_id = await begun(store)
    await ask(store, session_id, a_call("t1"), expires_at=clock.now + timedelta(days=30))
    clock.now += timedelta(days=30, seconds=1)
    for result_ in ("allow", "deny"):
        with pytest.raises(Superseded, match="expired"):
            await send(store, session_id, said("t1", result_))
    assert await state(store, session_id) is S.PENDING
    assert await store.expire_due() == 1
    with pytest.raises(NotWaiting):
        await claim(store, session_id)
