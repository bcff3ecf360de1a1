"""How calls come before a human: by the agent's policy, as the owner judged it, and by the workspace's, as it is now."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from claude_hitl_template.domain import events
from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.events import Draft
from claude_hitl_template.domain.models import (
    KINDS,
    Approval,
    ApprovalState,
    Decision,
    StoredPolicy,
    new_id,
    workspace_of,
)
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.domain.policy import JOINED, Evaluation, Verdict
from claude_hitl_template.domain.policy.floor import STRICTNESS
from claude_hitl_template.domain.policy.tiers import (
    BY_DEFAULT,
    Requirement,
    Tier,
    WorkspaceRule,
    covers,
    joined,
)
from claude_hitl_template.errors import Forbidden, InvalidInput
from claude_hitl_template.store.outbox import tell_approval
from claude_hitl_template.store.protocol import Call
from claude_hitl_template.store.recording import record_approval
from claude_hitl_template.store.session_aggregate import BY_RULE, SessionAggregate
from claude_hitl_template.store.votes import judged, stored_policy

TOOL_USES = ("agent.tool_use", "agent.mcp_tool_use")


@dataclass(frozen=True)
class Asked:
    """How a call comes before a human.

    Attributes:
        rules: The workspace's rules that ask for it.
        by_default: Whether the policy's default does, and no rule.
        standing_rule: What a human had remembered, where that answers.
        denied: The rule that denies it; "" if none does.
        version: Of the policy.
    """

    rules: tuple[WorkspaceRule, ...]
    by_default: bool
    standing_rule: str | None
    denied: str
    version: int

    @property
    def waits(self) -> bool:
        return not self.denied and self.standing_rule is None

    def requirements(self, now: datetime) -> tuple[Requirement, ...]:
        own = tuple(rule.requirement(now) for rule in self.rules)
        return own or ((Requirement(),) if self.by_default else ())


def asked_by(stored: StoredPolicy, call: Call, cwd: str) -> Asked | None:
    """How a call comes before a human, if it does.

    The owner has judged it, with the links of its own machine. A call that it judged by another version of the policy is
    judged again here.
    """
    named = [rule for rule in stored.policy.rules if rule.action == "ask" and rule.pattern in call.rules]
    tier = Tier(Evaluation(Verdict.ask if call.rules else Verdict.allow, BY_DEFAULT))
    if call.policy_version != stored.version:
        folder = Path(call.cwd or cwd)
        workspace = workspace_of(folder, call.folder) or folder
        tier = stored.policy.evaluate(call.tool_name, call.input, workspace, folder)
    asks = call.verdict == "ask" or call.standing_rule is not None
    if call.verdict == "deny" or (not asks and tier.verdict is Verdict.allow):
        return None
    rules = tuple(dict.fromkeys((*tier.asks, *named)))
    by_default = tier.verdict is Verdict.ask and not rules
    standing = None if rules or by_default else call.standing_rule
    denied = tier.found.source if tier.verdict is Verdict.deny else ""
    return Asked(rules, by_default, standing, denied, stored.version)


def as_asked(draft: Draft, asked: Asked | None) -> Draft:
    """The event of a call with the verdict that the workspace's policy has made stricter."""
    if asked is None or draft.type not in TOOL_USES:
        return draft
    verdict = "deny" if asked.denied else "allow" if asked.standing_rule else "ask"
    before = draft.payload.get("evaluated_permission")
    if before is None or STRICTNESS[Verdict(verdict)] <= STRICTNESS[Verdict(before)]:
        return draft
    return draft.model_copy(update={"payload": {**draft.payload, **events.evaluated(verdict)}})


async def take_over(unit: SessionAggregate, call: Call, asked: Asked) -> Approval | None:
    """The approval of a held call that is issued again. One that was allowed for less than the workspace's policy asks for
    by now is superseded, and the call is asked for again."""
    held = await _held_twin(unit, call)
    if held is None:
        return None
    asking = asked.requirements(unit.now)
    if held.state is ApprovalState.ALLOWED and (asked.denied or _is_too_little(held, asking)):
        await unit.supersede_one(held)
        return None
    adopted = held.but(
        call_id=call.call_id,
        model_call_id=call.model_call_id,
        held=False,
        policy_version=asked.version,
    )
    if (
        adopted.state is ApprovalState.PENDING
        and joined(adopted.requirements, asking) != adopted.requirements
    ):
        adopted = adopted.asking(joined(adopted.requirements, asking))
    await unit.tx.put_approval(adopted)
    unit.set(unreported_refusals=tuple(i for i in unit.session.unreported_refusals if i != adopted.id))
    return adopted


async def open_approval(
    unit: SessionAggregate,
    call: Call,
    asked: Asked,
    *,
    batch: tuple[str, ...],
    cwd: str,
    expires_at: datetime | None,
) -> Approval:
    """A new approval, of one asking call."""
    approval = Approval(
        id=new_id("appr"),
        session_id=unit.session.id,
        workspace_id=unit.session.workspace_id,
        event_id=call.call_id,
        call_id=call.call_id,
        model_call_id=call.model_call_id,
        batch=batch,
        kind=KINDS.get(call.tool_name, "tool"),
        tool_name=call.tool_name,
        input=call.input,
        digest=call.digest,
        cwd=call.cwd or cwd,
        folder=call.folder,
        targets=call.targets,
        segments=call.segments,
        policy_version=asked.version,
        agent_id=call.agent_id,
        created_at=unit.now,
        expires_at=expires_at,
    )
    if asked.denied:
        approval = _denied_by_rule(unit, approval, asked.denied)
    elif asked.standing_rule:
        approval = _by_rule(unit, approval, asked.standing_rule)
    else:
        approval = approval.asking(asked.requirements(unit.now))
        tell_approval(unit.tx, "approval.requested", approval, unit.now)
    await unit.tx.put_approval(approval)
    return approval


def _by_rule(unit: SessionAggregate, approval: Approval, rule: str) -> Approval:
    """`rule`: the text of a remembered rule; for a command line of all the rules that allow its commands."""
    remembered = {str(one) for one in unit.session.rules}
    used = [one for one in (rule, *rule.split(JOINED)) if one in remembered]
    if not used:
        raise InvalidInput("no such rule is remembered in this session", "calls.standing_rule")
    decision = Decision(result="allow", decided_by=f"{BY_RULE}{rule}", decided_at=unit.now)
    allowed = approval.to(
        ApprovalState.ALLOWED, decision=decision, run_input=approval.input, run_digest=approval.digest
    )
    actor = Actor(name="remembered rule")
    record_approval(unit.tx, "approval.decided", allowed, actor, unit.now, rule=digest(used[0]))
    return allowed


def _denied_by_rule(unit: SessionAggregate, approval: Approval, source: str) -> Approval:
    decision = Decision(
        result="deny",
        deny_message=f"not permitted here ({source})",
        decided_by=f"{BY_RULE}{source}",
        decided_at=unit.now,
    )
    denied = approval.to(ApprovalState.DENIED, decision=decision, closed_at=unit.now)
    record_approval(unit.tx, "approval.decided", denied, Actor(name="workspace rule"), unit.now)
    return denied


def _is_too_little(allowed: Approval, asked: Sequence[Requirement]) -> bool:
    """Whether the people who allowed a call, if people did, do not satisfy what the policy asks for."""
    by_rule = allowed.decision is not None and allowed.decision.decided_by.startswith(BY_RULE)
    return bool(asked) and (by_rule or not covers(allowed.requirements, asked))


async def check_policy(unit: SessionAggregate, approval: Approval) -> None:
    """Raises Forbidden if the workspace's policy, by now, denies the call or asks for more people than allowed it."""
    stored = await stored_policy(unit.tx, unit.session.workspace_id)
    if stored.version == approval.policy_version:
        return
    given = approval.input if approval.run_input is None else approval.run_input
    tier = judged(stored.policy, approval, given)
    if tier.verdict is Verdict.deny:
        raise Forbidden(f"is not permitted now ({tier.found.source})")
    if _is_too_little(approval, tier.requirements(unit.now)):
        raise Forbidden(f"needs other approvers now ({tier.found.source})")


async def _held_twin(unit: SessionAggregate, call: Call) -> Approval | None:
    """A held approval of the identical call, decided or not. Its decision applies to this call, once."""
    refused = [await unit.tx.approval(approval_id) for approval_id in unit.session.unreported_refusals]
    for approval in [*await unit.open_approvals(), *refused]:
        if approval is None or not approval.held or approval.state is ApprovalState.CLAIMED:
            continue
        if approval.kind == "network":  # which no call of the model's can be
            continue
        if approval.tool_name == call.tool_name and _is_same(approval, call):
            return approval
    return None


def _is_same(approval: Approval, call: Call) -> bool:
    """The same input in the same folder; an earlier release recorded no folder, and the workspace's path may change."""
    if (approval.folder or ".") != (call.folder or "."):
        return False
    return approval.digest == approval.digest_of(call.input)
