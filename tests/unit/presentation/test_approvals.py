"""An approver sees which command asks and why, who must agree, who has, and who is looking at the call."""

from datetime import UTC, datetime
from typing import Any

import pytest

from claude_hitl_template.domain.models import Approval, Assignee, Reviewer, Vote
from claude_hitl_template.domain.policy import Verdict
from claude_hitl_template.domain.policy.command_segments import JudgedSegment
from claude_hitl_template.domain.policy.tiers import Approvers, Requirement
from claude_hitl_template.presentation.approvals import approval_parts, votes_text
from claude_hitl_template.presentation.events import event_view
from claude_hitl_template.presentation.views import Caution, Fields, Notice, Table

AT = datetime(2030, 1, 1, 12, tzinfo=UTC)
PUSH = Requirement(
    rule="Bash(git push:*)",
    reason="It leaves.",
    severity="high",
    approvers=Approvers(groups=("release",)),
    quorum=2,
    exclude_requester=True,
)


def shown(**more: Any) -> dict[str, Any]:
    approval = Approval(
        id="appr_1",
        session_id="sesn_1",
        workspace_id="wrkspc_1",
        event_id="t1",
        call_id="t1",
        batch=("t1",),
        tool_name="Bash",
        input={"command": "git status && git push"},
        digest="",
        cwd="/w",
        created_at=AT,
        **more,
    )
    return approval.model_dump(mode="json", by_alias=False)


def fields(approval: dict[str, Any]) -> dict[str, str]:
    return {
        field.name: field.value
        for part in approval_parts(approval)
        if isinstance(part, Fields)
        for field in part.fields
    }


def vote(name: str, **more: Any) -> Vote:
    return Vote(principal_id=f"user_{name}", name=name, at=AT, event_id="sevt_1", run_digest="", **more)


def test_a_call_that_takes_one_approver_has_nothing_more_to_show() -> None:
    assert approval_parts(shown()) == ()
    assert votes_text(shown()) == ""


def test_the_rule_its_reason_and_who_must_agree_are_shown() -> None:
    parts = approval_parts(shown(requirements=(PUSH,)))
    assert parts[0] == Caution("high: It leaves.")
    assert fields(shown(requirements=(PUSH,))) == {
        "asked for by": "Bash(git push:*) (It leaves.): 2 of the group release, not who asked for the session",
        "allowed by": "0 of 2",
    }


def test_votes_and_who_is_looking_are_shown() -> None:
    approval = shown(
        requirements=(PUSH,),
        votes=(vote("ann", updated_input={"command": "git push -n"}),),
        reviewer=Reviewer(principal_id="user_ben", name="ben", until=AT),
        assignee=Assignee(principal_id="user_cat", name="cat", by="ann", note="yours", at=AT),
    )
    found = fields(approval)
    assert found["allowed by"] == "1 of 2, by ann"
    assert "git push -n" in found["with input"]
    assert found["looked at by"].startswith("ben until 2030-01-01T12:00")
    assert found["handed to"] == "cat by ann: yours"


def test_which_command_of_a_line_asks_is_a_table() -> None:
    segments = (
        JudgedSegment(start=0, end=10, verdict=Verdict.allow, source="Bash(git status)"),
        JudgedSegment(start=14, end=22, verdict=Verdict.ask, source="Bash(git push:*)"),
    )
    [table] = approval_parts(shown(segments=segments))
    assert isinstance(table, Table)
    assert table.rows == (
        ("git status", "runs unasked", "Bash(git status)"),
        ("git push", "asks", "Bash(git push:*)"),
    )


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (
            {"type": "approval.vote", "by": "ann", "allowed_by": ["ann"], "missing": ["2 of the group x"]},
            "ann allows the call: 1 so far (ann)",
        ),
        (
            {"type": "approval.claimed", "by": "ann", "until": "12:05"},
            "ann is looking at the call until 12:05",
        ),
        ({"type": "approval.claimed", "by": "ann", "until": None}, "ann no longer looks at the call"),
        (
            {"type": "approval.delegated", "by": "ann", "to": {"name": "ben"}, "note": ""},
            "ann handed the call over to ben",
        ),
        (
            {"type": "approval.escalated", "rule": "Bash", "to": {"roles": [], "groups": ["oncall"]}},
            "There was no decision in time: oncall may decide as well",
        ),
    ],
)
def test_what_happens_to_a_waiting_call_is_a_notice(event: dict[str, Any], text: str) -> None:
    found = event_view(event)
    assert isinstance(found, Notice)
    assert found.text == text
