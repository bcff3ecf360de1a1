"""The Store's rules for the supervisor: leases, recovery, time."""

import contextlib
import time

from claude_hitl_template import events
from claude_hitl_template.errors import NotFound
from claude_hitl_template.models import Approval, ApprovalState, Session
from claude_hitl_template.store.base import SUPERVISED, StoreBase


class SupervisorRules(StoreBase):
    async def acquire(self, session_id: str, holder: str, *, lease_s: float) -> Session:
        async with self._changing(session_id) as unit:
            lost = unit.session.lease is not None
            unit.lease(holder, lease_s)
            await unit.close_unknown()
            if lost and unit.session.status == "running":
                unit.set(recoveries=unit.session.recoveries + 1)
                await unit.run(rescheduled=True)
        return unit.session

    async def drop_lease(self, session_id: str, epoch: int) -> None:
        """An idle session loses its lease at once; a running one keeps it, expired, so that it counts as lost."""
        async with self._changing(session_id) as unit:
            lease = unit.session.lease
            if lease is None or lease.epoch != epoch:
                return
            if unit.session.status == "running":
                unit.set(lease=lease.but(expires_at=unit.now))
            else:
                await unit.close_unknown()
                unit.set(lease=None, interrupted=False)

    async def give_up(self, session_id: str, message: str) -> None:
        async with self._changing(session_id) as unit:
            unit.set(lease=None)
            if unit.session.status in ("running", "rescheduling"):
                await unit.append([events.session_error(message)])
                await unit.break_off()

    async def supervised(self) -> list[Session]:
        async with self._reading() as tx:
            return await tx.supervised()

    async def wait_supervised(self, version: int, *, timeout_s: float) -> int:
        with self._signals.listen(SUPERVISED) as listener:
            if self._signals.version == version:
                await listener.wait(timeout_s)
            return self._signals.version

    async def expire_due(self) -> int:
        async with self._reading() as tx:
            due = await tx.due_approvals(self._clock())
        expired = 0
        for found in due:
            with contextlib.suppress(NotFound):  # deleted meanwhile
                expired += await self._expire(found)
        return expired

    async def _expire(self, found: Approval) -> bool:
        async with self._changing(found.session_id) as unit:
            approval = await unit.tx.approval(found.id)
            if approval is None or approval.state is not ApprovalState.PENDING:
                return False
            await unit.tx.put_approval(approval.to(ApprovalState.EXPIRED, closed_at=unit.now))
            if approval.held:
                unit.tell_later(approval)
            await unit.after_decisions()
            unit.wake()
        return True

    async def ping(self) -> None:
        async with self._backend.begin(write=True) as tx:
            await tx.find_key(f"ping {time.monotonic()}")
