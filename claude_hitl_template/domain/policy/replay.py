"""Replays recorded calls against a workspace's policy: which of them would be decided otherwise."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from claude_hitl_template.domain.policy.evaluation import Verdict
from claude_hitl_template.domain.policy.tiers import Requirement, Tier, WorkspacePolicy, covers, described

_ANY_TIME = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Difference:
    """A recorded call that a policy would decide otherwise: what was decided, and what would hold now."""

    approval_id: str
    tool_name: str
    given: Mapping[str, Any]
    before: str
    after: str


def difference(policy: WorkspacePolicy, approval: Mapping[str, Any]) -> Difference | None:
    """How a policy would decide an approval's call otherwise; None if it would not.

    Args:
        policy: the changed policy.
        approval: as the API shows it. Links of its folder are not followed as they were.
    """
    given = approval["input"] if approval["run_input"] is None else approval["run_input"]
    folder = Path(approval["cwd"])
    tier = policy.evaluate(str(approval["tool_name"]), given, folder, folder)
    known = tuple(Requirement.model_validate(one) for one in approval["requirements"])
    after = _after(tier, known, approval)
    if after is None:
        return None
    return Difference(approval["id"], approval["tool_name"], given, _before(approval), after)


def _before(approval: Mapping[str, Any]) -> str:
    decision = approval["decision"]
    if decision is None:
        return str(approval["state"])
    people = [vote["name"] for vote in approval["votes"]] or [decision["decided_by"]]
    word = "allowed" if decision["result"] == "allow" else "denied"
    return f"{word} by {', '.join(people if word == 'allowed' else [decision['decided_by']])}"


def _after(tier: Tier, known: tuple[Requirement, ...], approval: Mapping[str, Any]) -> str | None:
    decision = approval["decision"]
    denied = decision is not None and decision["result"] == "deny"
    if tier.verdict is Verdict.deny:
        return None if denied else f"denied ({tier.found.source})"
    if denied:
        return None  # a person's denial does not follow from a policy
    if tier.verdict is Verdict.allow:
        return "no rule of the workspace asks" if known else None
    asked = tier.requirements(_ANY_TIME)
    by_rule = decision is not None and str(decision["decided_by"]).startswith("rule:")
    if covers(known, asked) and not by_rule:
        return None
    return f"asks {'; '.join(dict.fromkeys(map(described, asked)))} ({tier.found.source})"
