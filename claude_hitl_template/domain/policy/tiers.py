"""A workspace's policy: rules in addition to the agent's, and who must agree to the calls that they ask for.

For each call the strictest of the agent's policy, the operator's floor and the workspace's policy holds: deny before ask
before allow. An `allow` of the workspace excepts a call from the workspace's own default and loosens nothing else.

What several rules ask of one call is asked together. Each rule is satisfied for itself: by `quorum` distinct people from its
own approvers. One person counts for every rule whose approvers they are among. The approval shows the highest severity and
every reason. Each rule's deadline runs for itself, and the first that denies ends the call.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from claude_hitl_template.domain import missing_dependency
from claude_hitl_template.domain.frozen import Frozen
from claude_hitl_template.domain.people import Action, Principal, Role
from claude_hitl_template.domain.policy.evaluation import Evaluation, Verdict, evaluate, matching
from claude_hitl_template.domain.policy.rules import PermissionPolicy, PolicyName, Rule

Severity = Literal["low", "medium", "high", "critical"]
_DEFAULT_SEVERITY: Severity = "medium"
SEVERITIES: tuple[Severity, ...] = ("low", "medium", "high", "critical")  # the mildest first

RuleAction = Literal["deny", "ask", "allow"]
POLICIES: Mapping[RuleAction, PolicyName] = {
    "deny": "always_deny",
    "ask": "always_ask",
    "allow": "always_allow",
}
MAX_RULES = 500
MAX_QUORUM = 20
MAX_DEADLINE_S = 30 * 24 * 3600
BY_DEFAULT = "default"  # the rule of a requirement that comes from a policy's default
_ASK_FIELDS = ("approvers", "quorum", "exclude_requester", "deadline_s", "on_deadline", "escalate_to")


Group = Annotated[str, Field(min_length=1, max_length=200)]


class Approvers(Frozen):
    """People who may decide: those with any of the roles or in any of the groups, as far as they may decide at all
    (role approver)."""

    roles: Annotated[tuple[Role, ...], Field(max_length=10)] = ()
    groups: Annotated[tuple[Group, ...], Field(max_length=100)] = ()

    @model_validator(mode="after")
    def _names_someone(self) -> Self:
        if not self.roles and not self.groups:
            raise ValueError("names no one; give `roles` or `groups`, or leave it out for the role approver")
        return self

    def include(self, person: Principal, workspace_id: str) -> bool:
        """Whether this person is among them now."""
        if not person.may(Action.DECIDE, workspace_id):
            return False
        return bool(person.roles_in(workspace_id) & set(self.roles) or set(person.groups) & set(self.groups))

    def with_(self, others: "Approvers") -> "Approvers":
        return Approvers(
            roles=tuple(dict.fromkeys((*self.roles, *others.roles))),
            groups=tuple(dict.fromkeys((*self.groups, *others.groups))),
        )

    def within(self, others: "Approvers") -> bool:
        """Whether all of them are among the others."""
        return set(self.roles) <= set(others.roles) and set(self.groups) <= set(others.groups)

    def __str__(self) -> str:
        return " or ".join([
            *(f"the role {role.value}" for role in self.roles),
            *(f"the group {group}" for group in self.groups),
        ])  # fmt: skip


EVERY_APPROVER = Approvers(roles=(Role.APPROVER,))


class Requirement(Frozen):
    """What one rule asks of an approval.

    Attributes:
        rule: The rule's pattern, or BY_DEFAULT.
        due_at: When its deadline passes; None: never.
        escalated_at: When it was handed on to `escalate_to`, who may decide from then on as well.
    """

    rule: str = BY_DEFAULT
    reason: str = ""
    severity: Severity = "medium"
    approvers: Approvers = EVERY_APPROVER
    quorum: int = 1
    exclude_requester: bool = False
    deadline_s: int | None = None
    escalate_to: Approvers | None = None
    due_at: datetime | None = None
    escalated_at: datetime | None = None

    def admits(self, person: Principal, workspace_id: str, requesters: frozenset[str]) -> bool:
        """Whether this person's vote counts. `requesters`: the principal ids of who asked for the session."""
        if self.exclude_requester and person.id in requesters:
            return False
        return self.approvers.include(person, workspace_id)

    def escalated(self, now: datetime) -> "Requirement | None":
        """This requirement after its deadline; None if the call is denied by it."""
        if self.escalate_to is None or self.escalated_at is not None or self.deadline_s is None:
            return None
        return self.but(
            approvers=self.approvers.with_(self.escalate_to),
            escalated_at=now,
            due_at=now + timedelta(seconds=self.deadline_s),
        )

    def at_least(self, other: "Requirement") -> bool:
        """Whether what satisfies this one satisfies the other, independent of the people."""
        allowed = other.approvers if other.escalate_to is None else other.approvers.with_(other.escalate_to)
        return (
            self.quorum >= other.quorum
            and self.approvers.within(allowed)
            and (self.exclude_requester or not other.exclude_requester)
        )


class WorkspaceRule(Frozen):
    """One rule. Everything but `pattern`, `action`, `severity` and `reason` goes with the action `ask` only."""

    pattern: str = Field(max_length=2000, description="For instance `Bash(git push:*)` or `Edit(src/**)`.")
    action: RuleAction
    severity: Severity = "medium"
    reason: str = Field(default="", max_length=2000, description="Shown to the approver.")
    approvers: Approvers = EVERY_APPROVER
    quorum: int = Field(
        default=1,
        ge=1,
        le=MAX_QUORUM,
        strict=True,
        description="How many distinct people must allow the call.",
    )
    exclude_requester: bool = Field(
        default=False,
        strict=True,
        description="Whether who created the session, or sent its last message, may not decide on the call.",
    )
    deadline_s: int | None = Field(
        default=None, ge=1, le=MAX_DEADLINE_S, strict=True, description="Seconds from the question on."
    )
    on_deadline: Literal["deny", "escalate"] = "deny"
    escalate_to: Approvers | None = Field(
        default=None, description="Who may decide as well, once the deadline has passed."
    )

    @model_validator(mode="after")
    def _is_understood(self) -> Self:
        self.as_rule()
        given = [name for name in _ASK_FIELDS if getattr(self, name) != type(self).model_fields[name].default]
        if self.action != "ask" and given:
            raise ValueError(f"`{given[0]}` goes with `action: ask` only; remove it")
        if (self.on_deadline == "escalate") != (self.escalate_to is not None):
            raise ValueError("`on_deadline: escalate` and `escalate_to` go together; give both or neither")
        if self.on_deadline == "escalate" and self.deadline_s is None:
            raise ValueError("`on_deadline: escalate` needs `deadline_s`")
        return self

    def as_rule(self) -> Rule:
        """The rule in the notation of agents. Raises ValueError for a pattern that is not understood."""
        try:
            return Rule(rule=self.pattern, policy=POLICIES[self.action])
        except ValidationError as error:
            why = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
            raise ValueError(f"pattern: {why}") from error

    def requirement(self, now: datetime) -> Requirement:
        """What the rule asks of a call that is asked for `now`."""
        same = ("reason", "severity", "approvers", "quorum", "exclude_requester", "deadline_s", "escalate_to")
        due_at = now + timedelta(seconds=self.deadline_s) if self.deadline_s is not None else None
        return Requirement(rule=self.pattern, due_at=due_at, **{name: getattr(self, name) for name in same})


@dataclass(frozen=True)
class Tier:
    """What a workspace's policy says of a call. `asks`: every rule that asks; empty where only the default does."""

    found: Evaluation
    asks: tuple[WorkspaceRule, ...] = ()

    @property
    def verdict(self) -> Verdict:
        return self.found.verdict

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of the rules that ask; BY_DEFAULT where only the default does."""
        if self.verdict is not Verdict.ask:
            return ()
        return tuple(rule.pattern for rule in self.asks) or (BY_DEFAULT,)

    def requirements(self, now: datetime) -> tuple[Requirement, ...]:
        """() unless the policy asks."""
        if self.verdict is not Verdict.ask:
            return ()
        return tuple(rule.requirement(now) for rule in self.asks) or (Requirement(),)


class WorkspacePolicy(Frozen):
    """A workspace's rules. `default` is for calls that match none: `allow` leaves them to the agent's policy and the
    operator's floor."""

    rules: Annotated[tuple[WorkspaceRule, ...], Field(max_length=MAX_RULES)] = ()
    default: RuleAction = "allow"

    def evaluate(
        self, tool_name: str, tool_input: Mapping[str, Any], workspace: Path, cwd: Path | None = None
    ) -> Tier:
        """What holds for one call. Never raises for a model's input; see `policy.evaluate`."""
        if not self.rules and self.default == "allow":
            return Tier(Evaluation(Verdict.allow, "default"))
        rules = [rule.as_rule() for rule in self.rules]
        matches = matching(rules, tool_name, tool_input, workspace, cwd)
        hit = [
            pair
            for pair, matched in zip(zip(self.rules, rules, strict=True), matches, strict=True)
            if matched
        ]
        denying = next((rule for one, rule in hit if one.action == "deny"), None)
        if denying is not None:
            return Tier(Evaluation(Verdict.deny, f"the workspace's rule: {denying}", denying))
        if tool_name == missing_dependency.FULL_NAME:
            return Tier(Evaluation(Verdict.allow, "built in"))
        asking = [(one, rule) for one, rule in hit if one.action == "ask"]
        if asking:
            source = f"the workspace's rule: {asking[0][1]}"
            return Tier(Evaluation(Verdict.ask, source, asking[0][1]), tuple(one for one, _ in asking))
        allows = PermissionPolicy(
            rules=tuple(rule for rule in rules if rule.policy == "always_allow"),
            default=POLICIES[self.default],
        )
        rest = evaluate(allows, tool_name, tool_input, workspace, cwd)
        if self.default == "allow" or rest.verdict is Verdict.allow:
            return Tier(Evaluation(Verdict.allow, rest.source))
        return Tier(Evaluation(rest.verdict, "the workspace's default"))


NO_POLICY = WorkspacePolicy()


def described(requirement: Requirement) -> str:
    """Whose agreement a requirement takes: `2 of the group release, not who asked for the session`."""
    people = "one" if requirement.quorum == 1 else str(requirement.quorum)
    other = ", not who asked for the session" if requirement.exclude_requester else ""
    return f"{people} of {requirement.approvers}{other}"


def joined(known: Iterable[Requirement], more: Iterable[Requirement]) -> tuple[Requirement, ...]:
    """The requirements of an approval with those of a changed policy: a rule that is stricter now holds as well, and one
    that was loosened or removed holds as it was asked."""
    found = list(known)
    for asked in more:
        if not any(one.rule == asked.rule and one.at_least(asked) for one in found):
            found.append(asked)
    return tuple(found)


def covers(known: Sequence[Requirement], asked: Iterable[Requirement]) -> bool:
    """Whether people who satisfied the requirements of an approval (() for one approver) satisfied these, too."""
    return all(any(one.at_least(other) for one in known or (Requirement(),)) for other in asked)


def severity_of(requirements: Iterable[Requirement]) -> Severity:
    """The highest of them; "medium" for none."""
    found: list[Severity] = [one.severity for one in requirements] or [_DEFAULT_SEVERITY]
    return max(found, key=SEVERITIES.index)


def unmet(
    requirements: Sequence[Requirement],
    voters: Iterable[Principal],
    workspace_id: str,
    requesters: frozenset[str],
) -> tuple[Requirement, ...]:
    """The requirements that these people, who allow the call, do not satisfy. Each person counts once."""
    people = {person.id: person for person in voters}
    return tuple(
        one
        for one in requirements
        if sum(one.admits(person, workspace_id, requesters) for person in people.values()) < one.quorum
    )
