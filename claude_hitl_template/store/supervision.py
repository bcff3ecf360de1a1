"""The Store's rules for the supervisor: leases, recovery, time."""

import contextlib
import time
from collections.abc import Sequence
from datetime import UTC, datetime

from claude_hitl_template.domain import events
from claude_hitl_template.domain.models import Approval, ApprovalState, Session, Supervised
from claude_hitl_template.domain.people import SERVICE
from claude_hitl_template.errors import InvalidInput, NotFound
from claude_hitl_template.store import reservations
from claude_hitl_template.store.base import SUPERVISED, StoreBase
from claude_hitl_template.store.clients import REPLIES_KEPT
from claude_hitl_template.store.outbox import tell_approval, tell_session
from claude_hitl_template.store.recording import record_approval
from claude_hitl_template.store.session_aggregate import SessionAggregate
from claude_hitl_template.store.votes import hand_on

RETIRED = 100  # sessions deleted in one call
EXISTING = 1000  # ids looked up in one call
OVER = datetime(1970, 1, 1, tzinfo=UTC)  # independent of clock jumps: the next owner gets another epoch


class SupervisorRules(StoreBase):
    async def acquire(self, session_id: str, holder: str, *, lease_s: float) -> Session:
        async with self._changing(session_id, "acquire") as unit:
            lease = unit.session.lease
            if lease is not None and lease.holder == holder and lease.expires_at > unit.now:
                return unit.session  # asked again, because the answer was lost
            lost = lease is not None
            unit.lease(holder, lease_s)
            await unit.close_unknown()
            await unit.remind_again()
            if lost and unit.session.status == "running":
                unit.set(recoveries=unit.session.recoveries + 1)
                await unit.run(rescheduled=True)
        return unit.session

    async def reserve(self, session: Session, *, lasts_s: float) -> None:
        async with self._writing("create_session") as tx:
            await reservations.put(tx, session, self._clock(), lasts_s)

    async def drop_lease(self, session_id: str, epoch: int) -> None:
        """An idle session loses its lease at once; a running one keeps it, expired, so that it counts as lost."""
        async with self._changing(session_id, "drop_lease") as unit:
            lease = unit.session.lease
            if lease is None or lease.epoch != epoch:
                return
            if unit.session.status == "running":
                unit.set(lease=lease.but(expires_at=OVER))
            else:
                await unit.close_unknown()
                unit.set(lease=None, interrupted=False)

    async def give_up(self, session_id: str, message: str) -> None:
        async with self._changing(session_id, "give_up") as unit:
            unit.set(lease=None)
            if unit.session.status in ("running", "rescheduling"):
                await unit.append_new(events.session_error(message))
                await unit.break_off()

    async def tell_waiting(self, session_id: str, epoch: int, message: str) -> None:
        async with self._changing(session_id, "tell_waiting") as unit:
            wanted = unit.session.status in (
                "running",
                "rescheduling",
            )  # it may have been interrupted meanwhile
            if unit.session.epoch == epoch and wanted:
                unit.set(waits_for_room=True)
                notice = events.session_error(message, retry="retrying")
                await unit.append([notice.model_copy(update={"id": f"sevt_waiting_{session_id}_{epoch}"})])

    async def supervised(self) -> list[Supervised]:
        async with self._reading() as tx:
            return await tx.supervised()

    async def existing(self, session_ids: Sequence[str]) -> list[str]:
        if len(session_ids) > EXISTING:
            raise InvalidInput(f"{EXISTING} ids at most", "session_ids")
        async with self._reading() as tx:
            return await tx.existing_sessions(session_ids)

    async def wait_supervised(self, version: int, *, timeout_s: float) -> int:
        with self._signals.listen(SUPERVISED) as listener:
            if self._supervised_version(version) == version:
                await listener.wait(timeout_s)
            return self._supervised_version(version)

    async def expire_due(self) -> int:
        async with self._reading() as tx:
            due = await tx.due_approvals(self._clock())
        expired = 0
        for found in due:
            with contextlib.suppress(NotFound):  # deleted meanwhile
                expired += await self._expire(found)
        return expired

    async def _expire(self, found: Approval) -> bool:
        async with self._changing(found.session_id, "expire") as unit:
            approval = await unit.tx.approval(found.id)
            if approval is None or approval.state is not ApprovalState.PENDING:
                return False
            handed = approval.escalated(unit.now)
            if handed is not None:
                await hand_on(unit, approval, handed)
                return False
            expired = approval.to(ApprovalState.EXPIRED, closed_at=unit.now)
            await unit.tx.put_approval(expired)
            record_approval(unit.tx, "approval.expired", expired, SERVICE, unit.now)
            tell_approval(unit.tx, "approval.expired", expired, unit.now)
            if approval.held:
                await unit.tell_later(expired)
            await unit.after_decisions()
            unit.wake()
        return True

    async def sweep_replies(self) -> int:
        async with self._writing("retire") as tx:
            now = self._clock()
            return await tx.forget_replies(now, now - REPLIES_KEPT)

    async def retire(self, before: datetime) -> list[str]:
        async with self._reading() as tx:
            found = await tx.unchanged_sessions(before, RETIRED)
        return [session_id for session_id in found if await self._retire(session_id, before)]

    async def _retire(self, session_id: str, before: datetime) -> bool:
        async with self._writing("retire") as tx:
            session = await tx.session(session_id)
            if session is None or not await _rests(SessionAggregate(tx, session, self._clock()), before):
                return False
            await tx.delete_session(session_id)
            tell_session(tx, "session.deleted", session, self._clock())
        self._forget(session_id)
        self._announce(None, session)
        return True

    async def ping(self, *, write: bool = True) -> None:
        async with self._backend.begin(write=write) as tx:
            await tx.find_key(f"ping {time.monotonic()}")


async def _rests(unit: SessionAggregate, before: datetime) -> bool:
    """Whether the session has no pending approval and no queued message, and has not changed since."""
    session = unit.session
    if session.lease is not None or session.updated_at >= before:
        return False
    at_rest = session.status == "idle" and session.stop_reason in (None, events.END_TURN)
    if session.archived_at is None and not at_rest:
        return False
    return not await unit.open_approvals() and not (
        session.archived_at is None and await unit.tx.queued(session.id)
    )
