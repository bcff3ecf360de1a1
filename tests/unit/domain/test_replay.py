"""Which recorded calls a changed policy would decide otherwise."""

from datetime import UTC, datetime
from typing import Any

import pytest

from claude_hitl_template.domain.policy.replay import difference
from claude_hitl_template.domain.policy.tiers import WorkspacePolicy

AT = datetime(2030, 1, 1, tzinfo=UTC)
TWO = {"pattern": "Bash(git push:*)", "action": "ask", "quorum": 2, "approvers": {"groups": ["release"]}}
ONE = {**TWO, "quorum": 1}
DENY = {"pattern": "Bash(git:*)", "action": "deny"}
TWO_ASKED = {"rule": "Bash(git push:*)", "quorum": 2, "approvers": {"roles": [], "groups": ["release"]}}


def _decision(result: str = "allow", by: str = "ann") -> dict[str, Any]:
    return {"result": result, "decided_by": by}


def _approval(**more: Any) -> dict[str, Any]:
    return {
        "id": "appr_1",
        "tool_name": "Bash",
        "input": {"command": "git push"},
        "run_input": None,
        "cwd": "/w",
        "state": "succeeded",
        "requirements": [],
        "votes": [],
        "decision": _decision(),
        **more,
    }


@pytest.mark.parametrize(
    ("rules", "more", "before", "after"),
    [
        ([], {}, None, None),
        ([DENY], {}, "allowed by ann", "denied (the workspace's rule: Bash(git:*))"),
        ([DENY], {"decision": _decision("deny")}, None, None),
        (
            [DENY],
            {"decision": None, "state": "pending"},
            "pending",
            "denied (the workspace's rule: Bash(git:*))",
        ),
        ([TWO], {}, "allowed by ann", "asks 2 of the group release (the workspace's rule: Bash(git push:*))"),
        ([TWO], {"decision": _decision("deny")}, None, None),
        ([ONE], {"requirements": [TWO_ASKED], "votes": [{"name": "ann"}, {"name": "ben"}]}, None, None),
        (
            [DENY],
            {"requirements": [TWO_ASKED], "votes": [{"name": "ann"}, {"name": "ben"}]},
            "allowed by ann, ben",
            "denied (the workspace's rule: Bash(git:*))",
        ),
        ([], {"requirements": [TWO_ASKED]}, "allowed by ann", "no rule of the workspace asks"),
        (
            [{"pattern": "Bash(git push:*)", "action": "ask"}],
            {"decision": _decision(by="rule:Bash(git push)")},
            "allowed by rule:Bash(git push)",
            "asks one of the role approver (the workspace's rule: Bash(git push:*))",
        ),
        ([DENY], {"run_input": {"command": "true"}}, None, None),  # what ran, and not what was proposed
    ],
)
def test_what_would_be_decided_otherwise(
    rules: list[dict[str, Any]], more: dict[str, Any], before: str | None, after: str | None
) -> None:
    found = difference(WorkspacePolicy.model_validate({"rules": rules}), _approval(**more))
    assert (found and found.before, found and found.after) == (before, after)
