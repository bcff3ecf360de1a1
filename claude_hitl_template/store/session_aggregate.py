"""One session inside one transaction: its status, its log and its approvals change together or not at all."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from claude_hitl_template.domain import events
from claude_hitl_template.domain.canonical_json import shown_host
from claude_hitl_template.domain.events import Draft
from claude_hitl_template.domain.models import (
    Approval,
    ApprovalState,
    Event,
    Lease,
    Session,
    check_session_transition,
)
from claude_hitl_template.errors import NotFound, StaleOwner
from claude_hitl_template.store.backend import Tx
from claude_hitl_template.store.outbox import tell_session, tell_superseded

OUTCOME_UNKNOWN = (
    "Outcome unknown: the process that ran this call ended before it recorded a result. "
    "The call may or may not have taken effect; it was not repeated."
)
BY_RULE = "rule:"  # what `decided_by` begins with where a rule decided
NOT_RUN = "Not run: it was superseded before it began."


def denial(refused: Approval) -> str:
    """The message to the model about a denied or expired call."""
    if refused.state is ApprovalState.EXPIRED:
        return "Denied: there was no decision on this call in time."
    reason = refused.decision.deny_message if refused.decision else None
    if refused.decision is not None and refused.decision.decided_by.startswith(BY_RULE):
        return f"Denied: {reason}."
    return f"Denied by a human: {reason}" if reason else "Denied by a human. No reason was given."


def host_opened(allowed: Approval) -> str:
    where = shown_host(allowed.input["host"], allowed.input["port"])
    if allowed.decision is not None and allowed.decision.remember is not None:
        return f"Allowed by a human: this session may reach {where} from now on."
    return f"Allowed by a human: this session may reach {where} until the end of the turn in which the agent learns of it."


class SessionAggregate:
    """A session under change. Until `save` nothing of the session itself is written."""

    def __init__(self, tx: Tx, session: Session, now: datetime) -> None:
        self.tx, self.session, self.now = tx, session, now
        self.appended: list[Event] = []
        self._stored = session

    @classmethod
    async def load(
        cls, tx: Tx, session_id: str, now: datetime, *, workspace_id: str | None = None
    ) -> "SessionAggregate":
        """Raises NotFound, also for the session of another workspace."""
        session = await tx.session(session_id)
        if session is None or (workspace_id is not None and session.workspace_id != workspace_id):
            raise NotFound(f"there is no session {session_id!r}")
        return cls(tx, session, now)

    @classmethod
    async def load_owned(cls, tx: Tx, session_id: str, epoch: int, now: datetime) -> "SessionAggregate":
        """Raises StaleOwner unless `epoch` is the session's present lease."""
        session = await tx.session(session_id)
        if session is None:
            raise StaleOwner(f"session {session_id} is gone")
        unit = cls(tx, session, now)
        unit.check_owner(epoch)
        return unit

    def check_owner(self, epoch: int) -> None:
        lease = self.session.lease
        if lease is None or lease.epoch != epoch:
            raise StaleOwner(f"session {self.session.id} is no longer driven by epoch {epoch}")

    def set(self, **changes: Any) -> None:
        self.session = self.session.but(**changes)

    def wake(self) -> None:
        self.set(revision=self.session.revision + 1)

    async def save(self) -> Session:
        """Writes the session if it changed."""
        if self.session is not self._stored:
            self.set(updated_at=self.now)
            await self.tx.put_session(self.session)
            self._stored = self.session
        return self.session

    async def append(self, drafts: Sequence[Draft]) -> list[Event]:
        """Gives each new event the next seq. An id that is in the log already is passed over."""
        given: dict[str, Draft] = {}
        for draft in drafts:
            given.setdefault(draft.id, draft)
        known = await self.tx.known_events(self.session.id, list(given))
        return await self.append_new(*[draft for id_, draft in given.items() if id_ not in known])

    async def append_new(self, *drafts: Draft) -> list[Event]:
        """As `append`, for events whose ids were made in this transaction, or are known not to be in the log."""
        fresh = [
            Event(
                seq=seq,
                id=draft.id,
                type=draft.type,
                payload=draft.payload,
                created_at=self.now,
                processed_at=None if draft.queued else self.now,
            )
            for seq, draft in enumerate(drafts, self.session.next_seq)
        ]
        self.set(next_seq=self.session.next_seq + len(fresh))
        await self.tx.add_events(self.session.id, fresh)
        self.appended += fresh
        return fresh

    def begin_turn(self, event_id: str) -> None:
        """From now on this message, which is queued no more, is being worked on."""
        self.set(turn=event_id, turn_base=self.session.manifests)

    async def run(self, *, rescheduled: bool = False) -> None:
        """Sets the status `running`, through `rescheduling` if an owner was lost."""
        if rescheduled:
            check_session_transition(self.session.status, "rescheduling")
            await self.append_new(events.status_rescheduled())
            tell_session(self.tx, "session.status_rescheduled", self.session, self.now)
        elif self.session.status == "running":
            return
        check_session_transition("rescheduling" if rescheduled else self.session.status, "running")
        since = self.session.running_since or self.now
        self.set(status="running", stop_reason=None, running_since=since)
        await self.append_new(events.status_running())
        tell_session(self.tx, "session.status_run_started", self.session, self.now)

    async def idle(self, stop_reason: dict[str, Any]) -> None:
        check_session_transition(self.session.status, "idle")
        self._tell_idle(stop_reason)
        self._stop_clock()
        self.set(status="idle", stop_reason=stop_reason, waits_for_room=False)
        await self.append_new(events.status_idle(stop_reason))

    def _tell_idle(self, stop_reason: dict[str, Any]) -> None:
        """Tells that it stopped, not that it waits for one call less."""
        before, why = self.session, stop_reason["type"]
        if before.status == "idle" and before.stop_reason and before.stop_reason["type"] == why:
            return
        tell_session(self.tx, "session.status_idled", before, self.now)
        if why == "requires_action":
            tell_session(self.tx, "session.requires_action", before, self.now)
        elif why == "retries_exhausted":
            tell_session(self.tx, "session.failed", before, self.now)

    async def terminate(self) -> None:
        check_session_transition(self.session.status, "terminated")
        self._stop_clock()
        self.set(status="terminated", stop_reason=None, waits_for_room=False)
        await self.append_new(events.draft("session.status_terminated"))
        tell_session(self.tx, "session.status_terminated", self.session, self.now)

    def _stop_clock(self) -> None:
        since = self.session.running_since
        if since is not None:
            elapsed = max((self.now - since).total_seconds(), 0.0)
            self.set(active_seconds=self.session.active_seconds + elapsed, running_since=None)

    async def open_approvals(self) -> list[Approval]:
        return await self.tx.open_approvals(self.session.id)

    async def pending(self) -> list[Approval]:
        return [a for a in await self.open_approvals() if a.state is ApprovalState.PENDING]

    async def holds_up(self) -> bool:
        """Whether a call waits for a human. A pending host does not stop the session."""
        return _holds_up(await self.pending())

    async def supersede(self) -> None:
        """Supersedes pending approvals and allowed ones that have not begun."""
        self.set(unreported_refusals=(), refused_hosts=())
        for approval in await self.open_approvals():
            if approval.state in (ApprovalState.PENDING, ApprovalState.ALLOWED):
                await self.supersede_one(approval)

    async def supersede_one(self, approval: Approval) -> None:
        if approval.kind == "network" and approval.state is ApprovalState.ALLOWED:  # it was open until now
            claimed = approval.to(ApprovalState.CLAIMED)
            await self.tx.put_approval(claimed.to(ApprovalState.SUCCEEDED, closed_at=self.now))
            return
        await self.tx.put_approval(approval.to(ApprovalState.SUPERSEDED, closed_at=self.now))
        tell_superseded(self.tx, approval, self.now)
        await self._append_result(approval, NOT_RUN)

    async def tell_later(self, refused: Approval) -> None:
        """The model was asked to issue the call again; its next turn begins with the refusal instead."""
        self.set(unreported_refusals=(*self.session.unreported_refusals, refused.id))
        if refused.kind == "network":
            self.set(refused_hosts=(*self.session.refused_hosts, refused.id))
        await self._append_result(refused, denial(refused))

    async def open_host(self, allowed: Approval) -> None:
        """Records the result of an allowed host with the decision: there is no call to run."""
        blocks = events.text_blocks(host_opened(allowed))
        await self.append([events.tool_result(allowed.event_id, blocks, is_error=False)])

    async def _append_result(self, approval: Approval, text: str, outcome: str | None = None) -> None:
        """Appends the one result of a call whose result the CLI does not give, or gives a second time."""
        mcp = approval.tool_name.startswith("mcp__")
        blocks = events.text_blocks(text)
        await self.append([
            events.tool_result(approval.event_id, blocks, is_error=True, mcp=mcp, outcome=outcome)
        ])  # fmt: skip

    async def remind_again(self) -> None:
        """A reminder is valid for the owner that gave it: if that owner died, the model may not have received it."""
        for approval in await self.open_approvals():
            if approval.reminded:
                await self.tx.put_approval(approval.but(reminded=False))

    async def close_unknown(self) -> None:
        """Closes claimed calls without a result as unknown, in the log too; they are never repeated."""
        for approval in await self.open_approvals():
            if approval.state is ApprovalState.CLAIMED:
                await self.tx.put_approval(approval.to(ApprovalState.UNKNOWN, closed_at=self.now))
                await self._append_result(approval, OUTCOME_UNKNOWN, "unknown")

    async def break_off(self) -> None:
        """Sets the status `idle` and keeps everything for the owner that resumes the turn. An interrupted turn is over."""
        await self.close_unknown()
        self.set(
            recoveries=0,
            interrupted=False,
            turn=None if self.session.interrupted else self.session.turn,
        )
        pending = await self.pending()
        asked = events.requires_action([a.event_id for a in pending])
        await self.idle(asked if _holds_up(pending) else events.RETRIES_EXHAUSTED)

    async def after_decisions(self) -> None:
        """Updates what the session still waits for, or makes it run when there is nothing left."""
        pending = await self.pending()
        if _holds_up(pending):
            await self.idle(events.requires_action([a.event_id for a in pending]))
        else:
            await self.run()

    def lease(self, holder: str, lease_s: float) -> None:
        epoch = self.session.epoch + 1
        expires = self.now + timedelta(seconds=lease_s)
        lease = Lease(epoch=epoch, holder=holder, expires_at=expires)
        self.set(epoch=epoch, lease=lease, waits_for_room=False)


def _holds_up(pending: Sequence[Approval]) -> bool:
    return any(approval.kind != "network" for approval in pending)
