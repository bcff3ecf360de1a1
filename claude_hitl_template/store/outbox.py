"""The outbox: notices are written in the transaction of what they tell, and only if some channel wants them."""

import re
from datetime import datetime

from claude_hitl_template.domain.models import Approval, ApprovalState, Session, new_id
from claude_hitl_template.domain.notices import ApprovalNotice, Notice, SessionNotice
from claude_hitl_template.store.backend import Tx

_TOOL = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,99}")  # the model chooses the name; it is not for sentences
_NOUNS = {"question": "A question", "plan": "A plan", "network": "A connection to a host"}
_SAID: dict[ApprovalNotice, str] = {
    "approval.requested": "waits for approval",
    "approval.escalated": "still waits for approval; its deadline has passed",
    "approval.delegated": "was handed over to you",
    "approval.expired": "expired without a decision",
    "approval.superseded": "no longer waits for approval",
}
_SESSION_SAID: dict[SessionNotice, str] = {
    "session.created": "A session was created",
    "session.status_run_started": "A session runs",
    "session.status_idled": "A session is idle",
    "session.requires_action": "A session waits for a decision",
    "session.status_rescheduled": "A session continues after its process was lost",
    "session.status_terminated": "A session has ended",
    "session.failed": "A session stopped: it can't go on by itself",
    "session.archived": "A session was archived",
    "session.deleted": "A session was deleted",
}


def tell_approval(tx: Tx, kind: ApprovalNotice, approval: Approval, now: datetime) -> None:
    """Adds a notice of an approval when the transaction is committed."""
    tx.told.append(notice_of(kind, approval, now))


def notice_of(kind: ApprovalNotice, approval: Approval, now: datetime) -> Notice:
    """The notice of what happened to an approval."""
    decision = approval.decision if kind == "approval.decided" else None
    return Notice(
        id=new_id("ntc"),
        kind=kind,
        workspace_id=approval.workspace_id,
        session_id=approval.session_id,
        approval_id=approval.id,
        severity=approval.severity,
        created_at=now,
        title=_title(kind, approval),
        result=decision.result if decision else None,
    )


def outcome_notice(approval: Approval, now: datetime) -> Notice:
    """The notice that is right for an approval that no longer waits."""
    if approval.decision is not None:
        return notice_of("approval.decided", approval, now)
    expired = approval.state is ApprovalState.EXPIRED
    return notice_of("approval.expired" if expired else "approval.superseded", approval, now)


def tell_superseded(tx: Tx, before: Approval, now: datetime) -> None:
    """A notice of a call that stops waiting without a decision; none of one that did not wait."""
    if before.state is ApprovalState.PENDING:
        tell_approval(tx, "approval.superseded", before, now)


def tell_session(tx: Tx, kind: SessionNotice, session: Session, now: datetime) -> None:
    """Adds a notice of a session when the transaction is committed."""
    tx.told.append(
        Notice(
            id=new_id("ntc"),
            kind=kind,
            workspace_id=session.workspace_id,
            session_id=session.id,
            created_at=now,
            title=_SESSION_SAID[kind],
        )
    )


def _title(kind: ApprovalNotice, approval: Approval) -> str:
    named = approval.tool_name if _TOOL.fullmatch(approval.tool_name) else "A tool"
    noun = _NOUNS.get(approval.kind, named)
    if kind == "approval.voted":
        return f"{noun} has {len(approval.votes)} of {approval.quorum} approvals or more"
    if kind == "approval.decided" and approval.decision is not None:
        how = "allowed" if approval.decision.result == "allow" else "denied"
        return f"{noun} was {how} by {approval.decision.decided_by}"
    return f"{noun} {_SAID[kind]}"


async def post(tx: Tx) -> bool:
    """Writes what the transaction tells, as far as channels want it; returns whether there was any."""
    told, tx.told = tx.told, []
    found: list[Notice] = []
    for workspace_id in dict.fromkeys(notice.workspace_id for notice in told):
        kinds = await tx.wanted_kinds(workspace_id)
        found += [notice for notice in told if notice.workspace_id == workspace_id and notice.kind in kinds]
    if found:
        await tx.add_notices(found)
    return bool(found)
