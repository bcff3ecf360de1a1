"""The Store's rules for reading the audit log: listings, exports and receipts. Entries are written by recording.py."""

from typing import Any, Literal

from claude_hitl_template.domain.audit import Entry
from claude_hitl_template.domain.audit.checkpoints import export_end
from claude_hitl_template.domain.audit.receipts import CLOSING, receipt
from claude_hitl_template.domain.models import Page
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.errors import Conflict, InvalidInput, NotFound
from claude_hitl_template.store.base import StoreBase, decode_seq_cursor, encode_cursor
from claude_hitl_template.store.filters import EVERY_ENTRY, AuditFilter, Order
from claude_hitl_template.store.pages import fill
from claude_hitl_template.store.recording import record

EXPORTED_AT_ONCE = 500  # entries
RECEIPT_ENTRIES = 200  # more than an approval can have votes


class AuditRules(StoreBase):
    async def list_audit(
        self,
        workspace_id: str,
        *,
        limit: int,
        page: str | None = None,
        order: Order = "desc",
        matching: AuditFilter = EVERY_ENTRY,
    ) -> Page[Entry]:
        after = decode_seq_cursor("audit", page)
        async with self._reading() as tx:

            async def fetch(after: int | None, count: int) -> list[Entry]:
                return await tx.audit_entries(
                    workspace_id, after=after, limit=count, order=order, matching=matching
                )

            found, more = await fill(fetch, _seq, after, limit)
        return Page(data=found, next_page=encode_cursor("audit", str(found[-1].seq)) if more else None)

    async def begin_export(
        self, workspace_id: str, export_id: str, *, form: Literal["jsonl", "ocsf"], from_seq: int, by: Actor
    ) -> dict[str, Any]:
        this = AuditFilter(target=export_id)
        async with self._writing("begin_export") as tx:
            if not await tx.audit_entries(workspace_id, after=None, limit=1, order="asc", matching=this):
                due = (await tx.audit_head(workspace_id)).seq + 1
                if from_seq > due:
                    raise InvalidInput(f"the log has {due - 1} entries", "from_seq")
                details = {"format": form, "from_seq": from_seq}
                now = self._clock()
                record(tx, workspace_id, "audit.exported", by, export_id, details=details, now=now)
        async with self._reading() as tx:
            [last] = await tx.audit_entries(workspace_id, after=None, limit=1, order="asc", matching=this)
            [first] = await tx.audit_entries(
                workspace_id, after=from_seq - 1, limit=1, order="asc", matching=EVERY_ENTRY
            )
        return export_end(self._signer, first, last, self._clock())

    async def export_audit(
        self, workspace_id: str, *, after: int, up_to: int
    ) -> tuple[list[dict[str, Any]], int]:
        async with self._reading() as tx:

            async def fetch(after: int | None, count: int) -> list[Entry]:
                return await tx.audit_entries(
                    workspace_id, after=after, limit=count, order="asc", matching=EVERY_ENTRY
                )

            entries, _ = await fill(fetch, _seq, after, min(EXPORTED_AT_ONCE, up_to - after))
            last = entries[-1].seq if entries else up_to
            signed = await tx.audit_checkpoints(workspace_id, after=after, up_to=last)
        documents = [*(entry.wire() for entry in entries), *signed]
        return sorted(documents, key=lambda one: (one["seq"], one["type"] != "audit_entry")), last

    async def audit_keys(self) -> list[dict[str, str]]:
        return [self._signer.jwk]

    async def approval_receipt(self, approval_id: str, workspace_id: str) -> dict[str, Any]:
        async with self._reading() as tx:
            entries = await tx.audit_entries(
                workspace_id,
                after=None,
                limit=RECEIPT_ENTRIES,
                order="asc",
                matching=AuditFilter(target=approval_id),
            )
            approval = await tx.approval(approval_id)
        if any(entry.action in CLOSING for entry in entries):
            return receipt(self._signer, entries, self._clock())
        if approval is None or approval.workspace_id != workspace_id:
            raise NotFound(f"there is no approval {approval_id!r}")
        if approval.decision is None:
            raise Conflict(f"{approval_id} is {approval.state.value}: there is no decision to prove")
        raise Conflict(f"{approval_id} was decided before this service kept an audit log")


def _seq(entry: Entry) -> int:
    return entry.seq
