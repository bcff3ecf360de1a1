"""A workspace's rules: the strictest holds, what several ask is asked together, and people are counted once."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from claude_hitl_template.domain.people import EVERYWHERE, Principal, Role
from claude_hitl_template.domain.policy import Verdict
from claude_hitl_template.domain.policy.documents import read_file
from claude_hitl_template.domain.policy.tiers import (
    BY_DEFAULT,
    NO_POLICY,
    Approvers,
    Requirement,
    Tier,
    WorkspacePolicy,
    covers,
    joined,
    severity_of,
    unmet,
)
from claude_hitl_template.errors import ConfigError

AT = datetime(2030, 1, 1, tzinfo=UTC)
WORKSPACE = "wrkspc_1"
FOLDER = Path("/workspace")
NO_ONE: frozenset[str] = frozenset()


def _policy(*rules: dict[str, Any], **more: Any) -> WorkspacePolicy:
    return WorkspacePolicy.model_validate({"rules": rules, **more})


def _ask(pattern: str, **more: Any) -> dict[str, Any]:
    return {"pattern": pattern, "action": "ask", **more}


def _person(name: str, *groups: str, roles: tuple[Role, ...] = (Role.APPROVER,), **more: Any) -> Principal:
    return Principal(
        id=f"user_{name}",
        kind="user",
        name=name,
        created_at=AT,
        roles={WORKSPACE: roles},
        groups=groups,
        **more,
    )


def _tier(policy: WorkspacePolicy, command: str) -> Tier:
    return policy.evaluate("Bash", {"command": command}, FOLDER)


# -- what holds for a call


@pytest.mark.parametrize(
    ("tool", "given", "verdict"),
    [
        ("Bash", {"command": "git push"}, "ask"),
        ("Bash", {"command": "make && git push origin"}, "ask"),
        ("Bash", {"command": "env git push"}, "ask"),
        ("Bash", {"command": "terraform apply"}, "deny"),
        ("Bash", {"command": "git push; terraform apply"}, "deny"),
        ("Bash", {"command": "make"}, "allow"),
        ("Write", {"file_path": "infra/x.tf", "content": ""}, "ask"),
        ("NotebookEdit", {"notebook_path": "infra/deep/x.ipynb", "new_source": ""}, "ask"),
        ("Read", {"file_path": "infra/x.tf"}, "allow"),
        ("mcp__pay__refund", {"amount": 1}, "ask"),
        ("mcp__payroll__list", {}, "allow"),
        ("Network", {"host": "a.prod.example", "port": 443}, "deny"),
        ("ExitPlanMode", {"plan": "x"}, "ask"),
        ("Bash", {"command": 3}, "allow"),
    ],
)
def test_the_strictest_matching_rule_holds(tool: str, given: dict[str, Any], verdict: str) -> None:
    policy = _policy(
        {"pattern": "Bash(git push:*)", "action": "allow"},  # loosens nothing
        _ask("Bash(git push:*)"),
        _ask("Edit(infra/**)"),
        _ask("mcp__pay"),
        _ask("ExitPlanMode", quorum=2),
        {"pattern": "Bash(terraform apply:*)", "action": "deny"},
        {"pattern": "Network(*.prod.example)", "action": "deny"},
    )
    assert policy.evaluate(tool, given, FOLDER).verdict == Verdict(verdict)


def test_a_default_is_for_what_no_rule_names_and_an_allow_rule_excepts_from_it() -> None:
    policy = _policy({"pattern": "Bash(git status:*)", "action": "allow"}, default="ask")
    assert _tier(policy, "git status").verdict is Verdict.allow
    asked = _tier(policy, "git status && rm x")
    assert asked.verdict is Verdict.ask
    assert asked.requirements(AT) == (Requirement(rule=BY_DEFAULT),)
    denies = _policy({"pattern": "Bash(git status:*)", "action": "allow"}, default="deny")
    assert _tier(denies, "rm x").verdict is Verdict.deny
    assert _tier(NO_POLICY, "rm -rf /").verdict is Verdict.allow


def test_a_denial_names_its_rule() -> None:
    found = _tier(_policy({"pattern": "Bash(rm:*)", "action": "deny"}), "rm x").found
    assert found.source == "the workspace's rule: Bash(rm:*)"


# -- what several rules ask together


def test_each_rule_that_asks_is_satisfied_for_itself() -> None:
    policy = _policy(
        _ask("Bash(git:*)", severity="low", approvers={"groups": ["dev"]}, quorum=2),
        _ask("Bash(git push:*)", severity="critical", approvers={"groups": ["legal"]}, reason="It leaves."),
    )
    asked = _tier(policy, "git push").requirements(AT)
    assert [one.rule for one in asked] == ["Bash(git:*)", "Bash(git push:*)"]
    assert severity_of(asked) == "critical"
    ann, ben, cat = _person("ann", "dev"), _person("ben", "dev", "legal"), _person("cat", "legal")
    assert [one.rule for one in unmet(asked, [ann, cat], WORKSPACE, NO_ONE)] == ["Bash(git:*)"]
    assert unmet(asked, [ann, ben], WORKSPACE, NO_ONE) == (), "one person counts for both of their groups"
    assert len(unmet(asked, [ann, ann], WORKSPACE, NO_ONE)) == 2, "one person counts once"


@pytest.mark.parametrize(
    ("person", "counts"),
    [
        (_person("a", "release"), True),
        (_person("a"), False),
        (_person("a", "released"), False),
        (_person("a", "release", roles=(Role.REQUESTER, Role.OPERATOR)), False),  # may not decide at all
        (_person("a", "release", roles=(Role.REQUESTER, Role.APPROVER)), True),
        (_person("a", "release", disabled_at=AT), False),
        (_person("a", roles=(Role.APPROVER, Role.OPERATOR)), True),  # by its role
        (_person("requester", "release"), False),
        (
            _person("a", "release", roles=()).model_copy(update={"roles": {EVERYWHERE: (Role.APPROVER,)}}),
            True,
        ),
        (
            _person("a", "release", roles=()).model_copy(update={"roles": {"wrkspc_2": (Role.APPROVER,)}}),
            False,
        ),
    ],
)
def test_only_people_who_may_decide_now_count(person: Principal, counts: bool) -> None:
    asked = Requirement(
        approvers=Approvers(roles=(Role.OPERATOR,), groups=("release",)), exclude_requester=True
    )
    missing = unmet([asked], [person], WORKSPACE, frozenset({"user_requester"}))
    assert (missing == ()) is counts


# -- a policy that changes while a call waits


@pytest.mark.parametrize(
    ("now", "holds"),
    [
        (_ask("Bash(x)", quorum=2, approvers={"groups": ["dev", "ops"]}), True),
        (_ask("Bash(x)", approvers={"groups": ["dev"]}), True),  # fewer
        (_ask("Bash(x)", quorum=3, approvers={"groups": ["dev"]}), False),
        (_ask("Bash(x)", approvers={"groups": ["ops"]}), False),
        (_ask("Bash(x)", approvers={"groups": ["dev"]}, exclude_requester=True), False),
        (_ask("Bash(x:*)", approvers={"groups": ["dev"]}), True),  # another rule that asks for less
        ({"pattern": "Bash(x)", "action": "allow"}, True),
    ],
)
def test_what_was_satisfied_is_compared_with_the_policy_of_now(now: dict[str, Any], holds: bool) -> None:
    before = _tier(_policy(_ask("Bash(x)", quorum=2, approvers={"groups": ["dev"]})), "x").requirements(AT)
    after = _tier(_policy(now), "x")
    assert covers(before, after.requirements(AT)) is holds
    both = joined(before, after.requirements(AT))
    assert both[0] == before[0], "what was asked stays, also where the policy asks for less now"
    assert covers(both, after.requirements(AT))


def test_a_call_that_an_agents_policy_asked_for_was_decided_by_one_approver() -> None:
    assert covers((), _tier(_policy(_ask("Bash(x)")), "x").requirements(AT))
    assert not covers((), _tier(_policy(_ask("Bash(x)", quorum=2)), "x").requirements(AT))
    assert not covers(
        (), _tier(_policy(_ask("Bash(x)", approvers={"groups": ["dev"]})), "x").requirements(AT)
    )


# -- deadlines


def test_a_deadline_hands_on_once_and_then_denies() -> None:
    rule = _ask(
        "Bash(x)",
        approvers={"groups": ["dev"]},
        deadline_s=60,
        on_deadline="escalate",
        escalate_to={"groups": ["oncall"]},
    )
    asked = _tier(_policy(rule), "x").requirements(AT)[0]
    assert asked.due_at == AT + timedelta(seconds=60)
    later = AT + timedelta(seconds=90)
    handed = asked.escalated(later)
    assert handed is not None
    assert handed.due_at == later + timedelta(seconds=60)
    assert unmet([handed], [_person("o", "oncall")], WORKSPACE, NO_ONE) == ()
    assert unmet([handed], [_person("d", "dev")], WORKSPACE, NO_ONE) == ()
    assert unmet([asked], [_person("o", "oncall")], WORKSPACE, NO_ONE) == (asked,)
    assert handed.escalated(later) is None
    assert Requirement(deadline_s=60).escalated(later) is None
    assert covers([handed], _tier(_policy(rule), "x").requirements(AT)), "the rule itself lets them decide"


# -- files


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("rules:\n- pattern: bash\n  action: deny\n", "line 2: rules.0", "write `Bash`"),
        ("rules:\n- pattern: Bash\n  action: maybe\n", "line 3: rules.0.action", "'deny', 'ask' or 'allow'"),
        ("rules:\n- pattern: Bash\n  action: ask\n  quorum: 0\n", "line 4: rules.0.quorum", "greater than"),
        ("rules:\n- pattern: Bash\n  action: deny\n  quorum: 2\n", "line 2: rules.0", "`quorum` goes with"),
        ("rules:\n- pattern: Bash\n  action: ask\n  qorum: 2\n", "line 4: rules.0.qorum", "not permitted"),
        (
            "rules:\n- pattern: Bash\n  action: ask\n  approvers: {}\n",
            "line 4: rules.0.approvers",
            "names nobody",
        ),
        (
            "rules:\n- pattern: Bash\n  action: ask\n  approvers:\n    roles: [boss]\n",
            "line 5: rules.0.approvers.roles.0",
            "'approver'",
        ),
        (
            "rules:\n- pattern: Bash\n  action: ask\n  on_deadline: allow\n",
            "line 4: rules.0.on_deadline",
            "'deny' or 'escalate'",
        ),
        (
            "rules:\n- pattern: Bash\n  action: ask\n  on_deadline: escalate\n  escalate_to: {groups: [x]}\n",
            "line 2: rules.0",
            "needs `deadline_s`",
        ),
        (
            "rules:\n- pattern: Bash\n  action: ask\n  deadline_s: 5\n  on_deadline: escalate\n",
            "line 2: rules.0",
            "`escalate_to` go together",
        ),
        ("rules:\n- pattern: Bash(a && b)\n  action: allow\n", "line 2: rules.0", "one simple command"),
        ("rules: [\n", "line 2", "expected"),
        ("- a\n", "line 1", "valid dictionary"),
        ("default: loosen\n", "line 1: default", "'deny', 'ask' or 'allow'"),
        ('{"rules": [{"pattern": "Bash"}]}', "line 1: rules.0.action", "required"),
    ],
)
def test_a_file_that_is_wrong_names_the_line_and_the_field(
    tmp_path: Path, text: str, place: str, problem: str
) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_file(file, WorkspacePolicy, "FILE", "see docs/rules.md")
    assert place in caught.value.message
    assert problem in caught.value.message


def test_a_file_may_be_yaml_or_json_or_empty(tmp_path: Path) -> None:
    file = tmp_path / "rules"
    file.write_text('{"rules": [{"pattern": "Bash(git push:*)", "action": "ask", "quorum": 2}]}')
    assert read_file(file, WorkspacePolicy, "FILE", "").rules[0].quorum == 2
    file.write_text("")
    assert read_file(file, WorkspacePolicy, "FILE", "") == NO_POLICY
    with pytest.raises(ValidationError):
        WorkspacePolicy.model_validate({"rules": [{"pattern": "Bash", "action": "ask"}] * 501})
