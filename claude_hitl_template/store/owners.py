"""The Store's rules for owners: every write carries a lease epoch, and only the current one is accepted."""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from claude_hitl_template.domain import events
from claude_hitl_template.domain.canonical_json import call_digest
from claude_hitl_template.domain.events import Draft
from claude_hitl_template.domain.models import (
    Approval,
    ApprovalState,
    Lease,
    PermissionMode,
    Snapshot,
    Usage,
    new_id,
)
from claude_hitl_template.domain.policy import NETWORK, Verdict
from claude_hitl_template.domain.policy.tiers import Requirement
from claude_hitl_template.errors import Conflict, InvalidInput, NotWaiting, TooManyAsks
from claude_hitl_template.store.asks import (
    TOOL_USES,
    as_asked,
    asked_by,
    check_policy,
    open_approval,
    take_over,
)
from claude_hitl_template.store.backend import Tx
from claude_hitl_template.store.base import StoreBase, preview_topic, wake_topic
from claude_hitl_template.store.filters import TimeRange
from claude_hitl_template.store.outbox import tell_approval, tell_superseded
from claude_hitl_template.store.protocol import Call, TranscriptKey, TranscriptPart, TurnEnding
from claude_hitl_template.store.session_aggregate import SessionAggregate
from claude_hitl_template.store.votes import stored_policy

ANSWERABLE = (ApprovalState.PENDING, ApprovalState.ALLOWED, ApprovalState.DENIED, ApprovalState.EXPIRED)
CLIENTS_EVENTS = ("user.", "system.")
TRANSCRIPT_PIECE = 200  # entries that are read at once
LOST_CALLS = 10_000  # more than any session has
HOSTS_AT_ONCE = 20  # that wait for a decision in one session
MINUTE = timedelta(minutes=1)
LEASE_S = 15.0  # a third of it passes between two renewals; see session.RENEW_S


class OwnerRules(StoreBase):
    async def snapshot(self, session_id: str, epoch: int) -> Snapshot:
        async with self._reading() as tx:
            return await _snapshot(await SessionAggregate.load_owned(tx, session_id, epoch, self._clock()))

    async def find_approval(self, session_id: str, epoch: int, call_id: str) -> Approval | None:
        async with self._reading() as tx:
            await SessionAggregate.load_owned(tx, session_id, epoch, self._clock())
            return await tx.approval_of_call(session_id, call_id)

    async def lost_calls(self, session_id: str, epoch: int) -> list[Approval]:
        async with self._reading() as tx:
            session = (await SessionAggregate.load_owned(tx, session_id, epoch, self._clock())).session
            begun = await tx.event(session_id, session.turn) if session.turn else None
            # A turn that began with a reminder has no message: refusals before it and in it look the same.
            states = ANSWERABLE if begun else (ApprovalState.PENDING, ApprovalState.ALLOWED)
            found = await tx.approvals(
                session.workspace_id, after=None, limit=LOST_CALLS, states=states, session_id=session_id
            )
            if not found:
                return []
            uses = await tx.events(
                session_id,
                after=begun.seq if begun else 0,
                limit=LOST_CALLS,
                order="asc",
                types=TOOL_USES,
                created=TimeRange(),
            )  # by position in the log, which is independent of clocks
            of_this_turn = {use.id for use in uses}
            # One that was issued again was shown in an earlier turn.
            calls = [a for a in found if a.kind != "network"]
            asked = [a for a in calls if a.event_id in of_this_turn or a.call_id != a.event_id]
            known = await tx.known_events(session_id, [events.tool_result_id(a.event_id) for a in asked])
            return [a for a in asked if events.tool_result_id(a.event_id) not in known]

    async def wait_session(self, session_id: str, epoch: int, revision: int, *, timeout_s: float) -> Snapshot:
        with self._signals.listen(wake_topic(session_id)) as listener:
            if await self._known_revision(session_id, epoch) == revision:
                await listener.wait(timeout_s)
            found = await self.snapshot(session_id, epoch)
            if self._is_fresh(found.session.lease):
                return found
            await self._renew(session_id, epoch)
            return await self.snapshot(session_id, epoch)

    def _is_fresh(self, lease: Lease | None) -> bool:
        """Whether the lease need not be renewed yet. One that ends too late was granted before the clock was set back."""
        left_s = (lease.expires_at - self._clock()).total_seconds() if lease else LEASE_S
        return LEASE_S * 2 / 3 <= left_s <= LEASE_S

    async def _renew(self, session_id: str, epoch: int) -> None:
        async with self._writing("renew") as tx:
            unit = await SessionAggregate.load_owned(tx, session_id, epoch, self._clock())
            expires = unit.now + timedelta(seconds=LEASE_S)
            if unit.session.lease is not None:
                await tx.put_session(unit.session.but(lease=unit.session.lease.but(expires_at=expires)))

    async def commit(
        self,
        session_id: str,
        epoch: int,
        drafts: Sequence[Draft],
        *,
        permission_mode: PermissionMode | None = None,
        conversation: str | None = None,
        transcript: Sequence[TranscriptPart] = (),
    ) -> None:
        async with self._changing(session_id, "commit", epoch=epoch) as unit:
            await _append(unit, drafts)
            await _append_transcript(unit, transcript)
            if permission_mode is not None:
                unit.set(agent=unit.session.agent.but(permission_mode=permission_mode))
            if conversation is not None:
                unit.set(conversation=conversation)

    async def open_calls(
        self,
        session_id: str,
        epoch: int,
        drafts: Sequence[Draft],
        calls: Sequence[Call],
        *,
        cwd: str,
        expires_at: datetime | None,
    ) -> list[Approval]:
        async with self._changing(session_id, "open_calls", epoch=epoch) as unit:
            policy = await stored_policy(unit.tx, unit.session.workspace_id)
            asking = {call.call_id: asked for call in calls if (asked := asked_by(policy, call, cwd))}
            chosen = [call for call in calls if call.call_id in asking]
            known = [await unit.tx.approval_of_call(session_id, call.call_id) for call in chosen]
            taken = [
                old or await take_over(unit, call, asking[call.call_id])
                for call, old in zip(chosen, known, strict=True)
            ]
            fresh = [call for call, old in zip(chosen, taken, strict=True) if old is None]
            self._count_asks(unit, sum(asking[call.call_id].waits for call in fresh))
            shown = {call.call_id: old.event_id for call, old in zip(chosen, taken, strict=True) if old}
            await _append(
                unit, [as_asked(d, asking.get(d.id)) for d in drafts if shown.get(d.id, d.id) == d.id]
            )
            batch = tuple(
                shown.get(call.call_id, call.call_id) for call in chosen if asking[call.call_id].waits
            )
            opened = [
                old
                or await open_approval(
                    unit, call, asking[call.call_id], batch=batch, cwd=cwd, expires_at=expires_at
                )
                for call, old in zip(chosen, taken, strict=True)
            ]
            if any(a.state is ApprovalState.PENDING for a in opened) and None in known:
                await unit.after_decisions()
        return opened

    def _count_asks(self, unit: SessionAggregate, count: int) -> None:
        """Counts calls that wait for a human. Raises TooManyAsks if they are more than the session may have."""
        limits, session = self._limits, unit.session
        if not count or limits is None:
            return
        recent = [at for at in session.asked_at if at > unit.now - MINUTE]
        for found, limit, what in (
            (len(recent) + count, limits.per_minute, "within a minute"),
            (session.asked + count, limits.per_session, "since the last message"),
        ):
            if found > limit:
                raise TooManyAsks(
                    f"this session asked for {found} decisions {what}, and may ask for {limit}: it rests. "
                    "Send a message to let it go on"
                )
        unit.set(asked=session.asked + count, asked_at=(*recent, *[unit.now] * count))

    async def ask_network(
        self,
        session_id: str,
        epoch: int,
        call_id: str,
        given: Mapping[str, Any],
        *,
        cwd: str,
        expires_at: datetime | None,
    ) -> Approval:
        async with self._changing(session_id, "ask_network", epoch=epoch) as unit:
            known = await _speaks_for(unit, given)
            if known is not None:
                return known
            stored = await stored_policy(unit.tx, unit.session.workspace_id)
            tier = stored.policy.evaluate(NETWORK, given, Path(cwd))
            if tier.verdict is Verdict.deny:
                raise NotWaiting(f"the workspace does not permit it ({tier.found.source})")
            asked = tier.requirements(unit.now)
            opened = await _ask(
                unit, call_id, dict(given), cwd=cwd, expires_at=expires_at, requirements=asked
            )
            opened = opened.but(policy_version=stored.version)
            await unit.tx.put_approval(opened)
            self._count_asks(unit, 1)
            return opened

    async def begin_turn(self, session_id: str, epoch: int, event_id: str) -> None:
        async with self._changing(session_id, "begin_turn", epoch=epoch) as unit:
            if unit.session.turn == event_id:
                return
            if event_id not in {e.id for e in await unit.tx.queued(session_id)}:
                raise NotWaiting(f"message {event_id} is no longer queued")
            await unit.tx.set_processed(session_id, event_id, unit.now)
            unit.begin_turn(event_id)

    async def claim(
        self, session_id: str, epoch: int, call_id: str, run_digest: str, *, claim_id: str
    ) -> Approval:
        async with self._changing(session_id, "claim", epoch=epoch) as unit:
            approval = await unit.tx.approval_of_call(session_id, call_id)
            if approval is None or approval.call_id != call_id:
                raise NotWaiting(f"call {call_id} has no approval")
            if approval.claim_id == claim_id:
                return approval
            if approval.state is not ApprovalState.ALLOWED:
                raise NotWaiting(f"call {call_id} is {approval.state.value}, not allowed")
            if approval.run_digest != run_digest:
                raise NotWaiting(f"call {call_id} was allowed with another input")
            if unit.session.interrupted:
                raise NotWaiting(f"call {call_id} was interrupted")
            await check_policy(unit, approval)
            claimed = approval.to(ApprovalState.CLAIMED, claimed_epoch=epoch, claim_id=claim_id)
            await unit.tx.put_approval(claimed)
        return claimed

    async def hold(self, session_id: str, epoch: int, call_id: str) -> None:
        async with self._changing(session_id, "hold", epoch=epoch) as unit:
            approval = await unit.tx.approval_of_call(session_id, call_id)
            if approval is not None and not approval.held:
                await unit.tx.put_approval(approval.but(held=True, reminded=False))
                if approval.state in (ApprovalState.DENIED, ApprovalState.EXPIRED):
                    await unit.tell_later(approval)

    async def defer(self, session_id: str, epoch: int, call_id: str | None) -> None:
        async with self._changing(session_id, "defer", epoch=epoch) as unit:
            unit.set(deferred=call_id)

    async def remind(self, session_id: str, epoch: int, approval_ids: Sequence[str]) -> None:
        async with self._changing(session_id, "remind", epoch=epoch) as unit:
            unit.set(
                unreported_refusals=tuple(
                    i for i in unit.session.unreported_refusals if i not in approval_ids
                )
            )
            for approval_id in approval_ids:
                approval = await unit.tx.approval(approval_id)
                if approval is not None and approval.session_id == session_id:
                    await unit.tx.put_approval(approval.but(reminded=True))

    async def end_turn(
        self,
        session_id: str,
        epoch: int,
        drafts: Sequence[Draft],
        *,
        end_id: str,
        usage: Usage,
        stop_reason: Mapping[str, Any],
        how: TurnEnding = "over",
        transcript: Sequence[TranscriptPart] = (),
    ) -> Snapshot:
        async with self._changing(session_id, "end_turn", epoch=epoch) as unit:
            if unit.session.last_end != end_id:
                await _append(unit, drafts)
                await _append_transcript(unit, transcript)
                unit.set(last_end=end_id, usage=unit.session.usage.plus(usage), recoveries=0)
                if how == "over":
                    unit.set(deferred=None)
                if how in ("over", "dropped"):
                    await _finish(unit, dict(stop_reason))
                elif how == "broken off":
                    await unit.break_off()
                await unit.save()
            return await _snapshot(unit)

    async def release(self, session_id: str, epoch: int) -> bool:
        async with self._changing(session_id, "release") as unit:
            if unit.session.lease is None and unit.session.epoch == epoch:
                return True
            unit.check_owner(epoch)
            if unit.session.status == "running":
                return False
            unit.set(lease=None, interrupted=False)
        return True

    async def preview(self, session_id: str, epoch: int, deltas: Sequence[Mapping[str, Any]]) -> bool:
        """Called many times a second: the epoch is checked against this ledger's cache, mostly without the database."""
        await self._check_driver(session_id, epoch)
        for delta in deltas:
            position = self._previews.add(session_id, delta)
            self._post(["preview", session_id, position, dict(delta)])
        self._signals.wake(preview_topic(session_id))
        # Another ledger's streams are not known here.
        return self._backend.relay is not None or self._previews.are_wanted(session_id)

    async def append_transcript(
        self, key: TranscriptKey, entries: Sequence[Mapping[str, Any]], *, epoch: int | None = None
    ) -> None:
        async with self._writing("append_transcript") as tx:
            await self._check_scope(tx, key["scope"], epoch)
            await tx.append_transcript(key, entries, self._clock())

    async def load_transcript(
        self, key: TranscriptKey, *, epoch: int | None = None
    ) -> list[dict[str, Any]] | None:
        entries: list[dict[str, Any]] = []
        async with self._reading() as tx:
            await self._check_scope(tx, key["scope"], epoch)
            place = 0
            while piece := await tx.load_transcript(key, after=place, limit=TRANSCRIPT_PIECE):
                place = piece[-1][0]
                entries += [entry for _, entry in piece]
                await asyncio.sleep(0)  # other tasks run between the pieces of a long one
        return entries or None

    async def list_transcripts(
        self, scope: str, project_key: str, *, epoch: int | None = None
    ) -> list[tuple[TranscriptKey, int]]:
        async with self._reading() as tx:
            await self._check_scope(tx, scope, epoch)
            return await tx.list_transcripts(scope, project_key)

    async def delete_transcripts(self, key: TranscriptKey, *, epoch: int | None = None) -> None:
        async with self._writing("delete_transcripts") as tx:
            await self._check_scope(tx, key["scope"], epoch)
            await tx.delete_transcripts(key)

    async def _check_scope(self, tx: Tx, scope: str, epoch: int | None) -> None:
        if epoch is not None:
            await SessionAggregate.load_owned(tx, scope, epoch, self._clock())


async def _snapshot(unit: SessionAggregate) -> Snapshot:
    tx, session = unit.tx, unit.session
    unreported_refusals = [await tx.approval(approval_id) for approval_id in session.unreported_refusals]
    stored = await stored_policy(tx, session.workspace_id)
    return Snapshot(
        session=session,
        turn_event=await tx.event(session.id, session.turn) if session.turn else None,
        queued=tuple(await tx.queued(session.id)),
        approvals=tuple(await tx.open_approvals(session.id)),
        unreported_refusals=tuple(approval for approval in unreported_refusals if approval),
        at=unit.now,
        policy=stored.policy,
        policy_version=stored.version,
    )


async def _speaks_for(unit: SessionAggregate, given: Mapping[str, Any]) -> Approval | None:
    """The approval that applies to this host and port."""
    refused = [await unit.tx.approval(approval_id) for approval_id in unit.session.refused_hosts]
    for approval in [*await unit.open_approvals(), *refused]:
        if approval is not None and approval.kind == "network" and _is_same_host(approval, given):
            return approval
    return None


def _is_same_host(approval: Approval, given: Mapping[str, Any]) -> bool:
    return all(approval.input.get(name) == given[name] for name in ("host", "port"))


async def _ask(
    unit: SessionAggregate,
    call_id: str,
    given: dict[str, Any],
    *,
    cwd: str,
    expires_at: datetime | None,
    requirements: tuple[Requirement, ...],
) -> Approval:
    if unit.session.interrupted:
        raise NotWaiting("the turn was interrupted")
    if sum(a.kind == "network" for a in await unit.pending()) >= HOSTS_AT_ONCE:
        raise Conflict(f"{HOSTS_AT_ONCE} hosts wait for a decision already")
    approval = Approval(
        id=new_id("appr"),
        session_id=unit.session.id,
        workspace_id=unit.session.workspace_id,
        event_id=call_id,
        call_id=call_id,
        batch=(call_id,),
        kind="network",
        tool_name=NETWORK,
        input=given,
        digest=call_digest(given, cwd),
        cwd=cwd,
        folder=".",
        held=True,
        created_at=unit.now,
        expires_at=expires_at,
    ).asking(requirements)
    await unit.append([events.tool_use(call_id, NETWORK, given, "ask", None)])
    await unit.tx.put_approval(approval)
    tell_approval(unit.tx, "approval.requested", approval, unit.now)
    return approval


async def _append(unit: SessionAggregate, drafts: Sequence[Draft]) -> None:
    """Appends the owner's events; a result closes its call's approval. Events of clients are refused."""
    client_type = next((draft.type for draft in drafts if draft.type.startswith(CLIENTS_EVENTS)), None)
    if client_type is not None:
        raise InvalidInput(f"an owner commits no {client_type}", "drafts")
    fresh = await unit.append(drafts)
    for event in fresh:
        if event.type in ("agent.tool_result", "agent.mcp_tool_result"):
            call_id = event.payload.get("tool_use_id") or event.payload.get("mcp_tool_use_id") or ""
            state = ApprovalState.FAILED if event.payload.get("is_error") else ApprovalState.SUCCEEDED
            await _close(unit, call_id, ApprovalState.UNKNOWN if event.payload.get("outcome") else state)


async def _append_transcript(unit: SessionAggregate, parts: Sequence[TranscriptPart]) -> None:
    for key, entries in parts:
        await unit.tx.append_transcript(key, entries, unit.now)


async def _close(unit: SessionAggregate, event_id: str, state: ApprovalState) -> None:
    approval = await unit.tx.approval_of_call(unit.session.id, event_id)
    if approval is None:
        return
    if approval.state is ApprovalState.CLAIMED:
        await unit.tx.put_approval(approval.to(state, closed_at=unit.now))
    elif approval.state in (ApprovalState.PENDING, ApprovalState.ALLOWED) and not approval.held:
        await unit.tx.put_approval(approval.to(ApprovalState.SUPERSEDED, closed_at=unit.now))
        tell_superseded(unit.tx, approval, unit.now)
        if approval.state is ApprovalState.PENDING and unit.session.status == "idle":
            await unit.after_decisions()


async def _finish(unit: SessionAggregate, stop_reason: dict[str, Any]) -> None:
    """Ends the turn: pending approvals stay; decided ones that the model was reminded of without effect are superseded."""
    interrupted, failed = unit.session.interrupted, stop_reason == events.RETRIES_EXHAUSTED
    unreported_refusals = () if interrupted else unit.session.unreported_refusals
    refused = tuple(i for i in unit.session.refused_hosts if i in unreported_refusals)
    unit.set(
        turn=None,
        interrupted=False,
        unreported_refusals=unreported_refusals,
        refused_hosts=refused,
    )
    left: list[Approval] = []
    for approval in await unit.open_approvals():
        if approval.state is ApprovalState.CLAIMED:
            continue
        if failed and not interrupted and approval.state is ApprovalState.ALLOWED:
            # The model was not reached: the next turn reminds it of the decision.
            left.append(approval.but(held=True, reminded=False))
        elif interrupted or not approval.held or approval.reminded:
            await unit.supersede_one(approval)
            continue
        else:
            left.append(approval)
        await unit.tx.put_approval(left[-1])
    await unit.close_unknown()
    await unit.append_new(events.usage_event(unit.session.usage, unit.session.active_seconds))
    pending = [a for a in left if a.state is ApprovalState.PENDING]
    holds_up = any(a.kind != "network" for a in pending)
    goes_on = len(left) > len(pending) or unreported_refusals or await unit.tx.queued(unit.session.id)
    if not holds_up and not failed and goes_on:
        await unit.run()
    elif pending:
        await unit.idle(events.requires_action([a.event_id for a in pending]))
    elif (unit.session.status, unit.session.stop_reason) != ("idle", stop_reason):
        await unit.idle(stop_reason)
