"""What people read about sessions and approvals, in words."""

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from claude_hitl_template.domain.models import Approval, ApprovalState, Session
from claude_hitl_template.presentation.text import rule_text, with_escapes

POLICIES = {
    "risky": "Ask for what is risky: what writes, runs or leaves the machine",
    "everything": "Ask for everything, reading too",
    "plan": "Plan first: it shows a plan before it does anything",
}


def state_of(session: Session) -> str:
    """A session's state in words."""
    if session.archived_at is not None or session.status == "terminated":
        return "ended"
    reason = (session.stop_reason or {}).get("type")
    if session.status == "idle" and reason == "requires_action":
        return "waits for a decision"
    return {"idle": "waits for your next message", "running": "works"}.get(
        session.status, "is being started again"
    )


def fate(approval: Approval) -> str:
    """The outcome of a call, and who decided on it."""
    decision = approval.decision
    if decision is None:
        return {
            ApprovalState.PENDING: "Waits for a decision.",
            ApprovalState.EXPIRED: "Expired: no one decided in time. It never ran.",
            ApprovalState.SUPERSEDED: "Superseded: the session went on without it. It never ran.",
        }.get(approval.state, "Allowed by a remembered rule.")
    word = "Allowed" if decision.result == "allow" else "Denied"
    edited = ", edited," if decision.updated_input and approval.kind == "tool" else ""
    reason = f": {decision.deny_message}" if decision.deny_message else ""
    rule = f"; remembered: {rule_text(decision.remember.model_dump())}" if decision.remember else ""
    when = decision.decided_at.isoformat(sep=" ", timespec="seconds")
    return (
        f"{word}{edited} by {decision.decided_by} at {when}{reason}{rule}. Outcome: {approval.state.value}."
    )


def card_url(base_url: str, approval_id: str) -> str:
    """The address of the inbox's card of a call. `base_url`: where browsers reach the service."""
    return f"{base_url}/inbox/a/{quote(approval_id, safe='')}"


def editable(given: Mapping[str, Any]) -> str:
    """A call's input as JSON to edit. Hidden characters are JSON escapes, so that a browser changes none of it."""
    shown = json.dumps(given, ensure_ascii=False, indent=2)
    return with_escapes(shown, _json_escape)


def _json_escape(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else json.dumps(char)[1:-1]
