"""Every write is idempotent: if the answer to its commit was lost, repeating it changes nothing more."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from claude_hitl_template.domain import events
from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.events import UserInterrupt
from claude_hitl_template.domain.models import Agent, Environment, Event, Usage
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.errors import NotFound, StoreUnreachable
from claude_hitl_template.store.backend import Backend, Tx
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.protocol import TranscriptKey
from claude_hitl_template.testing.memory_backend import MemoryBackend
from tests.contract.asking import INPUT, KEY, ask_for, message, said


class Forgetful:
    """A backend that commits a write and then loses the connection before it answers."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self.relay = backend, backend.relay
        self.losing = False
        self.lost = 0

    @asynccontextmanager
    async def begin(self, *, write: bool) -> AsyncIterator[Tx]:
        async with self._backend.begin(write=write) as tx:
            yield tx
        if write and self.losing:
            self.losing = False
            self.lost += 1
            raise StoreUnreachable("the answer to the commit was lost")


class Repeating:
    """Calls a Store whose first answer is lost, and repeats the call as the ledger's callers do."""

    def __init__(self, store: CoreStore, backend: Forgetful) -> None:
        self._store, self._backend = store, backend

    def __getattr__(self, method: str) -> Any:
        async def call(*args: Any, **kwargs: Any) -> Any:
            self._backend.losing = True
            try:
                return await getattr(self._store, method)(*args, **kwargs)
            except StoreUnreachable:
                return await getattr(self._store, method)(*args, **kwargs)
            finally:
                self._backend.losing = False

        return call


async def live(store: Any, clock: Any, *, until: str, once: str = "") -> str:
    """Makes every kind of write for a session, and returns its id."""
    session = await store.create_session(
        KEY, agent=Agent(), environment=Environment(), title="t", metadata={}, initial=[message("go")],
        idempotency_key=f"create {once}",
    )  # fmt: skip
    sid = session.id

    async def send(name: str, *inbound: Any) -> None:
        await store.send_events(sid, KEY, inbound, by=Actor(name="ann"), idempotency_key=f"{name} {once}")

    await store.acquire(sid, "one", lease_s=15)
    epoch = (await store.get_session(sid)).epoch
    [queued] = (await store.list_events(sid, KEY, limit=9, types=["user.message"])).data
    await store.begin_turn(sid, epoch, queued.id)
    calls = [ask_for(call_id) for call_id in "abcd"]
    drafts = [events.tool_use(c.call_id, c.tool_name, c.input, c.verdict, None) for c in calls]
    await store.open_calls(sid, epoch, drafts, calls, cwd="/w", expires_at=clock.now)
    one, two = "one.example.org", "two.example.org"
    for host in (one, two):
        given = {"host": host, "port": 443, "because": "ls"}
        await store.ask_network(sid, epoch, host, given, cwd="/w", expires_at=None)
    await send("h", said(one, "allow"), said(two, "deny"))
    await send("m", message("more"))
    await send("a", said("a", "allow", remember=True))
    await send("b", said("b", "deny", deny_message="no"))
    await store.claim(sid, epoch, "a", digest(INPUT), claim_id="claim")
    key: TranscriptKey = {"scope": sid, "project_key": "-", "session_id": "s", "subpath": ""}
    done = events.tool_result("a", events.text_blocks("done"), False)
    await store.commit(sid, epoch, [done], transcript=[(key, [{"uuid": "0"}])])
    await store.hold(sid, epoch, "b")
    await send("c", said("c", "allow"))
    await store.claim(sid, epoch, "c", digest(INPUT), claim_id="claim 2")
    await store.expire_due()
    await store.append_transcript(key, [{"uuid": "1"}], epoch=epoch)
    await store.defer(sid, epoch, "d")
    refused = (await store.snapshot(sid, epoch)).unreported_refusals
    await store.remind(sid, epoch, [a.id for a in refused])
    await store.end_turn(
        sid, epoch, [events.agent_message("say", "hi")], end_id="end", usage=Usage(input_tokens=3),
        stop_reason=events.END_TURN, transcript=[(key, [{"uuid": "2"}])],
    )  # fmt: skip
    await send("i", UserInterrupt(type="user.interrupt"))
    await store.give_up(sid, "no room")
    await store.update_session(sid, KEY, changes={"title": "other", "metadata": {"k": "v"}})
    if until == "archive":
        await send("i2", UserInterrupt(type="user.interrupt"))
        await store.archive_session(sid, KEY)
    return sid


def essence(event: Event) -> Any:
    own_ids = ("usage", "running_seconds", "model_request_start_id")
    return event.type, event.seq, {k: v for k, v in event.payload.items() if k not in own_ids}


async def told(store: CoreStore, sid: str) -> dict[str, Any]:
    session = await store.get_session(sid)
    approvals = (await store.list_approvals(KEY, limit=100, session_id=sid)).data
    return {
        "events": [essence(e) for e in (await store.list_events(sid, KEY, limit=1000)).data],
        "approvals": sorted((a.call_id, a.state, a.held, a.claim_id, a.reminded) for a in approvals),
        "session": (session.status, session.stop_reason, session.usage, session.title, session.metadata),
        "rules": session.rules,
        "transcript": await store.load_transcript(
            {"scope": sid, "project_key": "-", "session_id": "s", "subpath": ""}
        ),
        "audit": [
            (entry.seq, entry.action, entry.details.get("result"))
            for entry in (await store.list_audit(KEY, limit=100)).data
        ],
        "key's sessions": len((await store.list_sessions(KEY, limit=100, include_archived=True)).data),
    }


@pytest.mark.parametrize("until", ["give up", "archive"])
async def test_a_life_in_which_every_answer_is_lost_once_ends_as_the_one_in_which_none_is(
    backend: Any, clock: Any, until: str
):
    forgetful = Forgetful(backend)
    store = CoreStore(forgetful, clock)
    sid = await live(Repeating(store, forgetful), clock, until=until)
    assert forgetful.lost >= 20
    found = await told(store, sid)
    assert found["key's sessions"] == 1
    plain = CoreStore(MemoryBackend(), clock)
    wanted = await told(plain, await live(plain, clock, until=until))
    assert found == wanted


async def test_a_session_that_was_deleted_is_gone_when_the_answer_was_lost(backend: Any, clock: Any):
    forgetful = Forgetful(backend)
    store = CoreStore(forgetful, clock)
    session = await store.create_session(
        KEY, agent=Agent(), environment=Environment(), title=None, metadata={}, initial=[]
    )
    with pytest.raises(NotFound):
        await Repeating(store, forgetful).delete_session(session.id, KEY)
    with pytest.raises(NotFound):
        await store.get_session(session.id)
