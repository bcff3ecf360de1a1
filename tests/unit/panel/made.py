"""Sessions and approvals for the panel's tests."""

from typing import Any

from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.models import KINDS, Approval, Session, new_id, utcnow
from claude_hitl_template.panel.forms import CallGroup

PAGES = "http://pages.test/claude-hitl"
QUESTIONS: dict[str, Any] = {
    "questions": [
        {"question": "Colour?", "options": [{"label": "Blue"}, {"label": "Green"}]},
        {"question": "Formats?", "multiSelect": True, "options": [{"label": "HTML"}, {"label": "PDF"}]},
    ]
}


def approval(tool: str = "Bash", given: dict[str, Any] | None = None, **changes: Any) -> Approval:
    given = {"command": "ls"} if given is None else given
    facts: dict[str, Any] = {
        "id": new_id("appr"), "session_id": "sesn_1", "workspace_id": "key_1", "event_id": new_id("toolu"), "call_id": "c",
        "batch": (), "kind": KINDS.get(tool, "tool"), "tool_name": tool, "input": given, "digest": digest(given),
        "cwd": "/workspace", "created_at": utcnow(),
    }  # fmt: skip
    return Approval(**{**facts, **changes})


def asked(*approvals: Approval, title: str = "Title", requester: str = "ann") -> CallGroup:
    now = utcnow()
    session = Session(id="sesn_1", workspace_id="key_1", title=title, created_at=now, updated_at=now)
    return CallGroup(session, requester, approvals, PAGES)
