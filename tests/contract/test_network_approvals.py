"""The Store's rules for approvals of hosts: when they wait, wake a session and close."""

from datetime import timedelta
from typing import Any

import pytest
from anthropic.types.beta.sessions import (
    BetaManagedAgentsAgentToolResultEvent,
    BetaManagedAgentsAgentToolUseEvent,
)

from claude_hitl_template.domain import events
from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.events import UserInterrupt
from claude_hitl_template.domain.models import Approval, ApprovalState, Session, Usage, new_id
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.errors import (
    AlreadyDecided,
    Conflict,
    InvalidInput,
    NotWaiting,
    StaleOwner,
    Superseded,
)
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.owners import HOSTS_AT_ONCE
from tests.contract.asking import INPUT, KEY, ask_for, create, log, message, said

HOST = {"host": "files.example.org", "port": 443, "because": "curl https://files.example.org/"}


async def begun(store: CoreStore) -> str:
    session = await create(store)
    await store.acquire(session.id, "owner", lease_s=15)
    [queued] = await log(store, session.id, "user.message")
    await store.begin_turn(session.id, 1, queued.id)
    return session.id


async def ask(
    store: CoreStore, sid: str, *, epoch: int = 1, expires_at: Any = None, **given: Any
) -> Approval:
    return await store.ask_network(
        sid, epoch, new_id("sevt"), {**HOST, **given}, cwd="/w", expires_at=expires_at
    )


async def end(store: CoreStore, sid: str, epoch: int = 1, stop: dict[str, Any] = events.END_TURN) -> Session:
    ended = await store.end_turn(sid, epoch, [], end_id=new_id("end"), usage=Usage(), stop_reason=stop)
    return ended.session


async def send(store: CoreStore, sid: str, *inbound: Any) -> None:
    await store.send_events(sid, KEY, inbound, by=Actor(name="ann"))


async def results(store: CoreStore, sid: str, approval: Approval) -> list[dict[str, Any]]:
    found = await log(store, sid, "agent.tool_result")
    return [e.payload for e in found if e.payload["tool_use_id"] == approval.event_id]


async def test_the_turn_goes_on_while_a_host_waits_and_ends_waiting_for_it(store: CoreStore):
    sid = await begun(store)
    asked = await ask(store, sid)
    assert (asked.kind, asked.state, asked.input) == ("network", ApprovalState.PENDING, HOST)
    assert (await store.get_session(sid)).status == "running"
    session = await end(store, sid)
    assert (session.status, session.stop_reason) == ("idle", events.requires_action([asked.event_id]))
    assert await store.release(sid, 1)


async def test_clients_of_the_protocol_see_a_tool_use_that_asks_and_its_one_result(store: CoreStore):
    sid = await begun(store)
    asked = await ask(store, sid)
    [use] = await log(store, sid, "agent.tool_use")
    seen = BetaManagedAgentsAgentToolUseEvent.model_validate(use.wire(), strict=False)
    assert (seen.id, seen.name, seen.evaluated_permission, seen.input) == (
        asked.event_id,
        "Network",
        "ask",
        HOST,
    )
    await send(store, sid, said(asked.event_id))
    [result] = await log(store, sid, "agent.tool_result")
    BetaManagedAgentsAgentToolResultEvent.model_validate(result.wire(), strict=False)
    await end(store, sid)
    assert len(await results(store, sid, asked)) == 1


async def test_a_host_does_not_keep_a_call_of_the_same_turn_from_running(store: CoreStore):
    sid = await begun(store)
    asked = await ask(store, sid)
    await store.open_calls(sid, 1, [], [ask_for("t1")], cwd="/w", expires_at=None)
    stop = (await store.get_session(sid)).stop_reason or {}
    assert sorted(stop["event_ids"]) == sorted([asked.event_id, "t1"])
    await send(store, sid, said("t1"))
    assert (await store.get_session(sid)).status == "running"
    await store.claim(sid, 1, "t1", digest(INPUT), claim_id="one")


async def test_a_decided_host_does_not_wake_a_session_whose_call_waits(store: CoreStore):
    sid = await begun(store)
    asked = await ask(store, sid)
    await store.open_calls(sid, 1, [], [ask_for("t1")], cwd="/w", expires_at=None)
    await send(store, sid, said(asked.event_id))
    session = await store.get_session(sid)
    assert (session.status, session.stop_reason) == ("idle", events.requires_action(["t1"]))


@pytest.mark.parametrize("result", ["allow", "deny"])
async def test_a_decision_wakes_a_parked_session_which_is_reminded_once(store: CoreStore, result: str):
    sid = await begun(store)
    asked, other = await ask(store, sid), await ask(store, sid, host="other.example.org")
    await end(store, sid)
    await store.release(sid, 1)
    await send(store, sid, said(asked.event_id, result))
    assert (await store.get_session(sid)).status == "running"
    await store.acquire(sid, "two", lease_s=15)
    now = await store.snapshot(sid, 2)
    decided = [a for a in now.approvals if a.state is ApprovalState.ALLOWED]
    assert [a.id for a in (*decided, *now.unreported_refusals)] == [asked.id]
    told = events.reminder(decided, now.unreported_refusals)
    assert told.startswith(events.HOSTS_DECIDED)
    assert ("files.example.org" in told, "refused" in told.splitlines()[1]) == (True, result == "deny")
    await store.remind(sid, 2, [asked.id])
    # In this turn a host that was allowed is open, and one that was denied is not asked for again.
    again = await ask(store, sid, epoch=2, because="another command")
    assert (again.id, again.state.value) == (asked.id, "allowed" if result == "allow" else "denied")
    session = await end(store, sid, 2)
    assert session.stop_reason == events.requires_action([other.event_id])
    closed = await store.get_approval(asked.id, KEY)
    assert closed.state is (ApprovalState.SUCCEEDED if result == "allow" else ApprovalState.DENIED)
    assert len(await results(store, sid, asked)) == 1
    # In the next turn it is.
    await send(store, sid, message("next"))
    assert (await ask(store, sid, epoch=2)).id != asked.id


async def test_a_message_is_worked_on_while_a_host_waits_and_decides_nothing(store: CoreStore):
    sid = await begun(store)
    asked = await ask(store, sid)
    await end(store, sid)
    await send(store, sid, message("yes, allow it"))
    assert (await store.get_session(sid)).status == "running"
    assert (await store.get_approval(asked.id, KEY)).state is ApprovalState.PENDING


async def test_a_grant_outlives_its_owner(store: CoreStore):
    sid = await begun(store)
    asked = await ask(store, sid)
    await send(store, sid, said(asked.event_id))
    await store.remind(sid, 1, [asked.id])
    await store.drop_lease(sid, 1)
    await store.acquire(sid, "two", lease_s=15)
    [approval] = (await store.snapshot(sid, 2)).approvals
    assert (approval.state, approval.reminded) == (ApprovalState.ALLOWED, False)


async def test_a_turn_that_failed_keeps_what_was_allowed_for_the_next(store: CoreStore):
    sid = await begun(store)
    asked = await ask(store, sid)
    await send(store, sid, said(asked.event_id))
    session = await end(store, sid, stop=events.RETRIES_EXHAUSTED)
    assert session.stop_reason == events.RETRIES_EXHAUSTED
    [approval] = (await store.snapshot(sid, 1)).approvals
    assert (approval.id, approval.state) == (asked.id, ApprovalState.ALLOWED)


async def test_only_the_first_decision_counts(store: CoreStore):
    sid = await begun(store)
    asked = await ask(store, sid)
    await send(store, sid, said(asked.event_id, "deny"))
    await send(store, sid, said(asked.event_id, "deny"))
    with pytest.raises(AlreadyDecided):
        await send(store, sid, said(asked.event_id, "allow"))


async def test_an_interrupt_supersedes_what_waits_and_closes_what_was_allowed(store: CoreStore):
    sid = await begun(store)
    waits, open_ = await ask(store, sid), await ask(store, sid, host="other.example.org")
    await send(store, sid, said(open_.event_id))
    await send(store, sid, UserInterrupt(type="user.interrupt"))
    states = [(await store.get_approval(a.id, KEY)).state for a in (waits, open_)]
    assert states == [ApprovalState.SUPERSEDED, ApprovalState.SUCCEEDED]
    assert [len(await results(store, sid, a)) for a in (waits, open_)] == [1, 1]
    with pytest.raises(NotWaiting):
        await ask(store, sid, host="third.example.org")
    with pytest.raises(Superseded):
        await send(store, sid, said(waits.event_id))


async def test_an_archived_session_waits_for_no_host(store: CoreStore):
    sid = await begun(store)
    asked = await ask(store, sid)
    await end(store, sid)
    await store.archive_session(sid, KEY)
    assert (await store.get_approval(asked.id, KEY)).state is ApprovalState.SUPERSEDED
    assert len(await results(store, sid, asked)) == 1


async def test_a_host_that_nobody_decided_on_in_time_is_refused(store: CoreStore, clock: Any):
    sid = await begun(store)
    asked = await ask(store, sid, expires_at=clock.now + timedelta(seconds=5))
    await end(store, sid)
    clock.now += timedelta(seconds=6)
    assert await store.expire_due() == 1
    assert (await store.get_session(sid)).status == "running"
    assert (await ask(store, sid)).state is ApprovalState.EXPIRED
    [result] = await results(store, sid, asked)
    assert "no decision" in result["content"][0]["text"]


async def test_a_stale_owner_asks_for_nothing(store: CoreStore):
    sid = await begun(store)
    await store.drop_lease(sid, 1)
    await store.acquire(sid, "two", lease_s=15)
    with pytest.raises(StaleOwner):
        await ask(store, sid)


async def test_one_question_for_each_host_and_port_and_no_more_than_twenty(store: CoreStore):
    sid = await begun(store)
    first = await ask(store, sid)
    assert (await ask(store, sid, because="something else")).id == first.id
    others = {(await ask(store, sid, port=port)).id for port in range(1000, 1000 + HOSTS_AT_ONCE - 1)}
    assert len(others | {first.id}) == HOSTS_AT_ONCE
    with pytest.raises(Conflict, match="20 hosts wait"):
        await ask(store, sid, host="one.more.example.org")


async def test_a_call_that_looks_like_a_host_opens_none(store: CoreStore):
    """The model may invent a tool of this name: its call gets no host's decision, and opens no host."""
    sid = await begun(store)
    asked = await ask(store, sid)
    call = ask_for("t1").model_copy(update={"tool_name": "Network", "input": HOST, "digest": asked.digest, "cwd": "/w", "folder": "."})  # fmt: skip  # noqa: E501
    [own] = await store.open_calls(sid, 1, [], [call], cwd="/w", expires_at=None)
    assert (own.id != asked.id, own.kind) == (True, "tool")


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"updated_input": {**HOST, "host": "other.example.org"}}, "updated_input"),
        ({"answers": {"q": "a"}}, "answers"),
        ({"remember": "Network(other.example.org)"}, "remember"),
        ({"remember": "Bash"}, "remember"),
    ],
)
async def test_a_host_is_decided_as_it_was_asked_for(store: CoreStore, more: dict[str, Any], field: str):
    sid = await begun(store)
    asked = await ask(store, sid)
    with pytest.raises(InvalidInput) as refused:
        await send(store, sid, said(asked.event_id, **more))
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("remember", "rule"),
    [(True, "Network(files.example.org:443)"), ("Network(*.example.org)", "Network(*.example.org)")],
)
async def test_a_rule_is_remembered_for_the_session(store: CoreStore, remember: Any, rule: str):
    sid = await begun(store)
    asked = await ask(store, sid)
    await send(store, sid, said(asked.event_id, remember=remember))
    assert [r.rule for r in (await store.get_session(sid)).rules] == [rule]
