"""The Store's rules for clients: sessions, sent events, listings and decisions."""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from claude_hitl_template.domain import events
from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.events import UserInterrupt, UserMessage, UserToolConfirmation
from claude_hitl_template.domain.models import (
    Agent,
    Approval,
    ApprovalState,
    Environment,
    Event,
    KeptDecision,
    Page,
    Session,
    SessionStatus,
    new_id,
)
from claude_hitl_template.domain.people import SERVICE, Actor
from claude_hitl_template.errors import Conflict, InvalidInput, NotFound
from claude_hitl_template.store import reservations
from claude_hitl_template.store.backend import Reply, Tx
from claude_hitl_template.store.base import (
    StoreBase,
    decode_seq_cursor,
    decode_time_cursor,
    encode_cursor,
    log_topic,
    preview_topic,
)
from claude_hitl_template.store.decisions import confirm
from claude_hitl_template.store.filters import Order, TimeRange
from claude_hitl_template.store.outbox import tell_session
from claude_hitl_template.store.pages import fill
from claude_hitl_template.store.protocol import NOW, OWN_KEY, Inbound
from claude_hitl_template.store.session_aggregate import SessionAggregate
from claude_hitl_template.store.votes import claim, delegate

REPLIES_KEPT = timedelta(days=2)
OWN_REPLIES_KEPT = timedelta(
    minutes=10
)  # of keys of our own: nothing is repeated for longer than a minute or two
FIRST_WORDS = 120  # characters
STREAM_PAUSE_S = 5.0  # most that passes until a stream asks for the next events
EVENTS_AT_ONCE = 500  # for a stream
MAX_METADATA_PAIRS = 16  # the wire protocol's own limit


class ClientRules(StoreBase):
    # -- sessions

    async def create_session(
        self,
        workspace_id: str,
        *,
        agent: Agent,
        environment: Environment,
        title: str | None,
        metadata: Mapping[str, str],
        initial: Sequence[UserMessage],
        by: Actor = SERVICE,
        idempotency_key: str | None = None,
    ) -> Session:
        request = digest([
            "create", agent.model_dump(mode="json"), environment.id, title, dict(metadata),
            [m.model_dump(mode="json") for m in initial],
        ])  # fmt: skip
        async with self._writing("create_session") as tx:
            scope = reply_scope(workspace_id, by)
            earlier = await earlier_reply(tx, scope, idempotency_key, request)
            if earlier is not None:
                session = (
                    await SessionAggregate.load(tx, earlier, self._clock(), workspace_id=workspace_id)
                ).session
            else:
                now = self._clock()
                reserved = await reservations.take(tx, workspace_id, agent, environment, now)
                session = Session(
                    id=reserved or new_id("sesn"),
                    workspace_id=workspace_id,
                    created_by=by.principal_id,
                    title=title,
                    metadata=dict(metadata),
                    agent=agent,
                    environment=environment,
                    created_at=now,
                    updated_at=now,
                )
                unit = SessionAggregate(tx, session, now)
                await tx.put_session(session)
                tell_session(tx, "session.created", session, now)
                await _send_all(unit, initial, by)
                session = await unit.save()
                await remember_reply(unit, scope, idempotency_key, request, session.id)
        self._announce(None, session)  # also if it existed: the first announcement may have been lost
        return session

    async def get_session(self, session_id: str, workspace_id: str | None = None) -> Session:
        async with self._reading() as tx:
            return (
                await SessionAggregate.load(tx, session_id, self._clock(), workspace_id=workspace_id)
            ).session

    async def list_sessions(
        self,
        workspace_id: str | None,
        *,
        limit: int,
        page: str | None = None,
        order: Order = "desc",
        statuses: Sequence[SessionStatus] = (),
        agent_id: str | None = None,
        created: TimeRange | None = None,
        include_archived: bool = False,
    ) -> Page[Session]:
        after = decode_time_cursor("sessions", page)
        async with self._reading() as tx:

            async def fetch(after: tuple[datetime, str] | None, count: int) -> list[Session]:
                return await tx.sessions(
                    workspace_id,
                    after=after,
                    limit=count,
                    order=order,
                    statuses=statuses,
                    agent_id=agent_id,
                    created=created or TimeRange(),
                    include_archived=include_archived,
                )

            found, more = await fill(fetch, _time_place, after, limit)
        return Page(data=found, next_page=_time_cursor("sessions", found[-1]) if more else None)

    async def update_session(
        self,
        session_id: str,
        workspace_id: str,
        *,
        changes: Mapping[str, Any],
        by: Actor = SERVICE,
        idempotency_key: str | None = None,
    ) -> Session:
        request = digest(["update", session_id, dict(changes)])
        async with self._changing(session_id, "update_session", workspace_id=workspace_id) as unit:
            scope = reply_scope(workspace_id, by)
            if await earlier_reply(unit.tx, scope, idempotency_key, request) is None:
                refuse_archived(unit)
                await _update(unit, changes)
                await remember_reply(unit, scope, idempotency_key, request, session_id)
        return unit.session

    async def archive_session(self, session_id: str, workspace_id: str, *, by: Actor = SERVICE) -> Session:
        async with self._changing(session_id, "archive_session", workspace_id=workspace_id) as unit:
            if unit.session.archived_at is None:
                await _refuse_running(unit, "archived")
                await unit.supersede()
                await unit.terminate()
                unit.set(archived_at=unit.now, lease=None, turn=None, deferred=None, interrupted=False)
                unit.wake()
                tell_session(unit.tx, "session.archived", unit.session, unit.now)
        return unit.session

    async def delete_session(self, session_id: str, workspace_id: str, *, by: Actor = SERVICE) -> None:
        async with self._writing("delete_session") as tx:
            unit = await SessionAggregate.load(tx, session_id, self._clock(), workspace_id=workspace_id)
            await _refuse_running(unit, "deleted")
            gone = [a.to(ApprovalState.SUPERSEDED) for a in await unit.pending()]
            await tx.delete_session(session_id)
            tell_session(tx, "session.deleted", unit.session, unit.now)
            tx.changed_approvals += gone
        # An owner and streams that still wait find the session gone.
        self._forget(session_id)
        self._announce(None, unit.session)

    # -- what clients send

    async def send_events(
        self,
        session_id: str,
        workspace_id: str | None,
        inbound: Sequence[Inbound],
        *,
        by: Actor,
        idempotency_key: str | None = None,
    ) -> list[Event]:
        async with self._changing(session_id, "send_events", workspace_id=workspace_id) as unit:
            return await _send_once(unit, workspace_id, inbound, by, idempotency_key)

    async def decide(
        self,
        approval_id: str,
        workspace_id: str | None,
        confirmation: UserToolConfirmation,
        *,
        by: Actor,
        idempotency_key: str | None = None,
    ) -> Approval:
        approval = await self.get_approval(approval_id, workspace_id)  # whose session and call never change
        confirmation = confirmation.model_copy(update={"tool_use_id": approval.event_id})
        async with self._changing(approval.session_id, "send_events", workspace_id=workspace_id) as unit:
            await _send_once(unit, workspace_id, [confirmation], by, idempotency_key)
            return await unit.tx.approval(approval_id) or approval

    async def claim_approval(
        self,
        approval_id: str,
        workspace_id: str | None,
        *,
        seconds: int,
        by: Actor,
        idempotency_key: str | None = None,
    ) -> Approval:
        async def change(unit: SessionAggregate, approval: Approval) -> Approval:
            return await claim(unit, approval, by, seconds)

        request = digest(["claim approval", approval_id, seconds])
        return await self._change_approval(
            approval_id, workspace_id, change, request=request, by=by, idempotency_key=idempotency_key
        )

    async def delegate_approval(
        self,
        approval_id: str,
        workspace_id: str | None,
        *,
        principal_id: str | None = None,
        group: str | None = None,
        note: str = "",
        by: Actor,
        idempotency_key: str | None = None,
    ) -> Approval:
        async def change(unit: SessionAggregate, approval: Approval) -> Approval:
            return await delegate(unit, approval, by, principal_id=principal_id, group=group, note=note)

        request = digest(["delegate approval", approval_id, principal_id, group, note])
        return await self._change_approval(
            approval_id, workspace_id, change, request=request, by=by, idempotency_key=idempotency_key
        )

    async def _change_approval(
        self,
        approval_id: str,
        workspace_id: str | None,
        change: Callable[[SessionAggregate, Approval], Awaitable[Approval]],
        *,
        request: str,
        by: Actor,
        idempotency_key: str | None,
    ) -> Approval:
        found = await self.get_approval(approval_id, workspace_id)  # whose session never changes
        async with self._changing(found.session_id, "send_events", workspace_id=workspace_id) as unit:
            approval, scope = await unit.tx.approval(approval_id) or found, reply_scope(workspace_id, by)
            if await earlier_reply(unit.tx, scope, idempotency_key, request) is None:
                approval = await change(unit, approval)
                await remember_reply(unit, scope, idempotency_key, request, approval_id)
            return approval

    # -- what clients read

    async def list_events(
        self,
        session_id: str,
        workspace_id: str | None,
        *,
        limit: int,
        page: str | None = None,
        order: Order = "asc",
        types: Sequence[str] = (),
        created: TimeRange | None = None,
    ) -> Page[Event]:
        after = decode_seq_cursor("events", page)
        async with self._reading() as tx:
            await SessionAggregate.load(tx, session_id, self._clock(), workspace_id=workspace_id)

            async def fetch(after: int | None, count: int) -> list[Event]:
                return await tx.events(
                    session_id,
                    after=after,
                    limit=count,
                    order=order,
                    types=types,
                    created=created or TimeRange(),
                )

            found, more = await fill(fetch, _seq, after, limit)
        return Page(data=found, next_page=encode_cursor("events", str(found[-1].seq)) if more else None)

    async def last_seq(self, session_id: str, workspace_id: str | None) -> int:
        return (await self.get_session(session_id, workspace_id)).next_seq - 1

    async def wait_events(
        self,
        session_id: str,
        workspace_id: str | None,
        after: int,
        *,
        timeout_s: float,
        previews: int | None = None,
    ) -> tuple[list[Event], list[dict[str, Any]], int]:
        deadline = time.monotonic() + timeout_s
        topics = (
            [log_topic(session_id)]
            if previews is None
            else [log_topic(session_id), preview_topic(session_id)]
        )
        if previews is not None:
            self._previews.want(session_id, timeout_s + STREAM_PAUSE_S)
        start = self._previews.now() if previews == NOW else previews
        self._recent.want(session_id, timeout_s + STREAM_PAUSE_S)
        with self._signals.listen(*topics) as listener:
            while True:
                found = await self._events_after(session_id, workspace_id, after)
                deltas, position = self._previews.after(session_id, start)
                if found or deltas:
                    return found, deltas, position
                if not await listener.wait(max(deadline - time.monotonic(), 0)):
                    self._recent.forget(session_id)  # so that nothing is missed for longer than this
                    return found, deltas, position

    async def _events_after(self, session_id: str, workspace_id: str | None, after: int) -> list[Event]:
        recent = self._recent.after(session_id, workspace_id, after) if self._hears_of_all else None
        if recent is not None:

            async def kept(after: int | None, count: int) -> list[Event]:
                return [event for event in recent if event.seq > (after or 0)][:count]

            return (await fill(kept, _seq, after, EVENTS_AT_ONCE))[0]
        async with self._reading() as tx:
            unit = await SessionAggregate.load(tx, session_id, self._clock(), workspace_id=workspace_id)

            async def fetch(after: int | None, count: int) -> list[Event]:
                return await tx.events(
                    session_id, after=after, limit=count, order="asc", types=(), created=TimeRange()
                )

            found = (await fill(fetch, _seq, after, EVENTS_AT_ONCE))[0]
        self._recent.know(session_id, unit.session.workspace_id, unit.session.next_seq - 1)
        return found

    async def list_approvals(
        self,
        workspace_id: str | None,
        *,
        limit: int,
        page: str | None = None,
        states: Sequence[ApprovalState] = (),
        session_id: str | None = None,
    ) -> Page[Approval]:
        after = decode_time_cursor("approvals", page)
        async with self._reading() as tx:

            async def fetch(after: tuple[datetime, str] | None, count: int) -> list[Approval]:
                return await tx.approvals(
                    workspace_id, after=after, limit=count, states=states, session_id=session_id
                )

            found, more = await fill(fetch, _time_place, after, limit)
        return Page(data=found, next_page=_time_cursor("approvals", found[-1]) if more else None)

    async def list_kept_decisions(self, *, limit: int, page: str | None = None) -> Page[KeptDecision]:
        after = decode_time_cursor("decisions", page)
        async with self._reading() as tx:

            async def fetch(after: tuple[datetime, str] | None, count: int) -> list[KeptDecision]:
                return await tx.kept_decisions(after=after, limit=count)

            found, more = await fill(fetch, _decided_place, after, limit)
        last = found[-1] if more else None
        next_page = encode_cursor("decisions", last.decided_at.isoformat(), last.id) if last else None
        return Page(data=found, next_page=next_page)

    async def get_approval(self, approval_id: str, workspace_id: str | None) -> Approval:
        async with self._reading() as tx:
            approval = await tx.approval(approval_id)
        if approval is None or workspace_id not in (None, approval.workspace_id):
            raise NotFound(f"there is no approval {approval_id!r}")
        return approval


async def _update(unit: SessionAggregate, changes: Mapping[str, Any]) -> None:
    session = unit.session
    changed: dict[str, Any] = {}
    if "title" in changes and changes["title"] != session.title:
        changed["title"] = changes["title"]
    if changes.get("metadata"):
        merged = {**session.metadata, **changes["metadata"]}
        metadata = {k: v for k, v in merged.items() if v is not None}
        if len(metadata) > MAX_METADATA_PAIRS:
            raise InvalidInput(f"at most {MAX_METADATA_PAIRS} pairs", "metadata")
        if metadata != session.metadata:
            changed["metadata"] = metadata
    if changed:
        unit.set(**changed)
        shown = {k: v for k, v in changed.items() if v != {}}
        await unit.append_new(events.draft("session.updated", **shown))


async def _send_once(
    unit: SessionAggregate,
    workspace_id: str | None,
    inbound: Sequence[Inbound],
    by: Actor,
    idempotency_key: str | None,
) -> list[Event]:
    session_id, scope = unit.session.id, reply_scope(workspace_id, by)
    request = digest(["send", session_id, [m.model_dump(mode="json") for m in inbound]])
    earlier = await earlier_reply(unit.tx, scope, idempotency_key, request)
    if earlier is not None:
        found = [await unit.tx.event(session_id, event_id) for event_id in earlier]
        return [e for e in found if e]
    sent = await _send_all(unit, inbound, by)
    await remember_reply(unit, scope, idempotency_key, request, [e.id for e in sent])
    return sent


def _seq(event: Event) -> int:
    return event.seq


def _time_place(noun: Session | Approval) -> tuple[datetime, str]:
    return noun.created_at, noun.id


def _decided_place(kept: KeptDecision) -> tuple[datetime, str]:
    return kept.decided_at, kept.id


def _time_cursor(kind: str, last: Session | Approval) -> str:
    return encode_cursor(kind, last.created_at.isoformat(), last.id)


async def _send_all(unit: SessionAggregate, inbound: Sequence[Inbound], by: Actor) -> list[Event]:
    sent: list[Event] = []
    for item in inbound:
        refuse_archived(unit)
        match item:
            case UserMessage():
                sent += await _queue(unit, item, by)
            case UserInterrupt():
                sent += await _interrupt(unit)
            case UserToolConfirmation():
                sent += await confirm(unit, item, by)
    return sent


async def _queue(unit: SessionAggregate, message: UserMessage, by: Actor) -> list[Event]:
    content = message.model_dump(mode="json")["content"]
    if unit.session.first_words is None:
        text = next((block.text for block in message.content if block.type == "text"), "")
        unit.set(first_words=text[:FIRST_WORDS])
    if unit.session.last_sender != by.principal_id:
        unit.set(last_sender=by.principal_id)
    if unit.session.asked:
        unit.set(asked=0, asked_at=())
    begins = _can_begin(unit.session)
    draft = events.draft("user.message", queued=not begins, content=content)
    [sent] = await unit.append_new(draft)
    if begins:
        unit.begin_turn(sent.id)
    waits = (unit.session.stop_reason or {}).get("type") == "requires_action"
    if not (waits and await unit.holds_up()):  # a message while a call waits is queued behind its turn
        await unit.run()
    unit.wake()
    return [sent]


def _can_begin(session: Session) -> bool:
    """Whether a message that comes now is its owner's next work: the owner need not write that it begins with it.

    An owner that has yet to end an interrupted turn, or to have a parked call denied, does that first.
    """
    rests = session.status == "idle" and session.stop_reason == events.END_TURN
    unfinished = session.interrupted or session.turn is not None or session.deferred is not None
    return rests and session.lease is not None and not unfinished


async def _interrupt(unit: SessionAggregate) -> list[Event]:
    sent = await unit.append_new(events.draft("user.interrupt"))
    await unit.supersede()
    session = unit.session
    if session.status == "running" and session.turn is None:
        await _end_unbegun_turn(unit)
    elif session.status != "idle":
        unit.set(interrupted=True)  # the current or the next owner ends the turn
    elif session.stop_reason != events.END_TURN:
        unit.set(interrupted=session.lease is not None)
        await _next_or_idle(unit)
    unit.wake()
    return sent


async def _end_unbegun_turn(unit: SessionAggregate) -> None:
    """Ends the turn of the next queued message without working on it; later messages stay queued."""
    queued = await unit.tx.queued(unit.session.id)
    if queued:
        await unit.tx.set_processed(unit.session.id, queued[0].id, unit.now)
    await _next_or_idle(unit)


async def _next_or_idle(unit: SessionAggregate) -> None:
    unit.set(turn=None)
    if await unit.tx.queued(unit.session.id):
        await unit.run()
    else:
        await unit.idle(events.END_TURN)


def refuse_archived(unit: SessionAggregate) -> None:
    if unit.session.archived_at is not None:
        raise Conflict(f"session {unit.session.id} is archived; it can be read, and not changed")


async def _refuse_running(unit: SessionAggregate, what: str) -> None:
    claimed = any(a.state is ApprovalState.CLAIMED for a in await unit.open_approvals())
    if claimed or unit.session.status in ("running", "rescheduling"):
        raise Conflict(
            f"session {unit.session.id} is running and cannot be {what}; send user.interrupt first, then try again"
        )


def reply_scope(workspace_id: str | None, by: Actor) -> str:
    """Whose idempotency keys they are: each API key's and each user's own in each workspace; "" for the service itself.

    Of a key whose workspace has its own id this is that id, as earlier versions recorded it.
    """
    parts = (workspace_id, by.key_id or by.principal_id)
    return " ".join(dict.fromkeys(part for part in parts if part is not None))


async def earlier_reply(tx: Tx, scope: str, idempotency_key: str | None, request: str) -> Any:
    """The reply to an earlier request with this key, or None. Raises Conflict when that was another request."""
    if idempotency_key is None:
        return None
    earlier = await tx.remembered_reply(scope, idempotency_key)
    if earlier is None:
        return None
    if earlier.digest != request:
        raise Conflict(
            "this Idempotency-Key came before with another request; use a new key for a new request"
        )
    return earlier.reply


async def remember_reply(
    unit: SessionAggregate, scope: str, idempotency_key: str | None, request: str, reply: Any
) -> None:
    if idempotency_key is not None:
        kept = OWN_REPLIES_KEPT if idempotency_key.startswith(OWN_KEY) else REPLIES_KEPT
        answer = Reply(request, reply, unit.now, unit.now + kept)
        await unit.tx.remember_reply(scope, idempotency_key, answer, session_id=unit.session.id)
