"""The operator's floor: no agent's policy and nothing remembered loosens it; a wrong file is named with its place."""

from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_hitl_template.domain.policy import (
    PermissionPolicy,
    PolicyName,
    Rule,
    Verdict,
    evaluate,
    remember_rule,
)
from claude_hitl_template.domain.policy.floor import BUILT_IN, STRICTNESS, Floor, is_narrow, read_floor
from claude_hitl_template.errors import ConfigError

HERE = Path("/nonexistent/claude-hitl")
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("Bash", {"command": "git status"}),
    ("Bash", {"command": "git push origin main"}),
    ("Bash", {"command": "rm -rf x; git status"}),
    ("Bash", {}),
    ("Monitor", {"command": "git status"}),
    ("Read", {"file_path": "src/a.py"}),
    ("Read", {"file_path": "/etc/passwd"}),
    ("Write", {"file_path": "src/a.py", "content": ""}),
    ("Edit", {"file_path": ".env", "old_string": "a", "new_string": "b"}),
    ("WebFetch", {"url": "https://example.com/x", "prompt": "p"}),
    ("WebSearch", {"query": "q"}),
    ("mcp__wiki__add", {"text": "x"}),
    ("AskUserQuestion", {"questions": []}),
    ("TodoWrite", {"todos": []}),
    ("Unheard", {}),
]
TEXTS = [
    "Bash", "Bash(git status)", "Bash(git:*)", "Bash(git push:*)", "Read", "Read(./src/**)", "Edit", "Edit(src/**)",
    "Edit(.env)", "WebFetch", "WebFetch(domain:example.com)", "WebSearch", "mcp__wiki", "mcp__wiki__add", "Unheard",
]  # fmt: skip
NAMES = st.sampled_from(get_args(PolicyName))
RULES = st.lists(st.builds(Rule, rule=st.sampled_from(TEXTS), policy=NAMES), max_size=4).map(tuple)
PARTS: dict[str, Any] = {
    "rules": RULES,
    "default": st.none() | NAMES,
    "servers": st.dictionaries(st.just("wiki"), NAMES, max_size=1),
}
POLICIES = st.builds(PermissionPolicy, **PARTS)
FLOORS = st.builds(Floor, **PARTS, remember=st.booleans())
REMEMBERED = st.lists(
    st.builds(Rule, rule=st.sampled_from(TEXTS), policy=st.just("always_allow")), max_size=3
).map(tuple)


def strictness(found: Any) -> int:
    return STRICTNESS[found.verdict]


@given(FLOORS, POLICIES, REMEMBERED, st.sampled_from(CALLS))
def test_nothing_loosens_the_floor_or_the_agents_own_policy(
    floor: Floor, policy: PermissionPolicy, remembered: tuple[Rule, ...], call: tuple[str, dict[str, Any]]
):
    both = floor.evaluate(policy, *call, HERE, remembered=remembered)
    asked = policy.model_copy(update={"rules": (*policy.rules, *remembered)})
    assert strictness(both) >= strictness(evaluate(asked, *call, HERE))
    held = evaluate(_as_policy(floor), *call, HERE)
    if held.verdict is Verdict.deny:
        assert both.verdict is Verdict.deny
    if held.verdict is Verdict.ask and both.verdict is Verdict.allow:
        server = floor.servers.get("wiki") if call[0].startswith("mcp__") else None
        if held.source == "default" and not (server or floor.default):
            assert call[0] == "Read" or any(is_narrow(rule) for rule in (*policy.rules, *remembered))
        else:
            assert floor.remember
            assert any(is_narrow(rule) and "*" not in rule.rule for rule in remembered)


def _as_policy(floor: Floor) -> PermissionPolicy:
    return PermissionPolicy(rules=floor.rules, default=floor.default, servers=floor.servers)


@given(FLOORS, POLICIES, st.sampled_from(CALLS))
def test_with_a_default_of_its_own_the_floor_holds_whatever_the_agents_policy_names(
    floor: Floor, policy: PermissionPolicy, call: tuple[str, dict[str, Any]]
):
    """Nothing is remembered: then the verdict is just the stricter of the two."""
    floor = floor.model_copy(update={"default": floor.default or "always_ask"})
    two = evaluate(policy, *call, HERE), evaluate(_as_policy(floor), *call, HERE)
    assert strictness(floor.evaluate(policy, *call, HERE)) == max(map(strictness, two))


def verdict(floor: Floor, allowing: str, call: tuple[str, dict[str, Any]], **more: Any) -> str:
    policy = PermissionPolicy(rules=(Rule(rule=allowing, policy="always_allow"),))
    return floor.evaluate(policy, *call, HERE, **more).verdict.value


@pytest.mark.parametrize(
    ("rule", "call", "expected"),
    [
        ("Bash", CALLS[0], "ask"),
        ("Bash(*)", CALLS[0], "ask"),
        ("Bash(git status:*)", CALLS[0], "allow"),
        ("Bash(bash:*)", ("Bash", {"command": "bash x.sh"}), "ask"),
        ("Bash(/usr/bin/python3 -c:*)", ("Bash", {"command": "/usr/bin/python3 -c 1"}), "ask"),
        ("Bash(python3 manage.py:*)", ("Bash", {"command": "python3 manage.py test"}), "allow"),
        ("Bash(env:*)", ("Bash", {"command": "env ls"}), "ask"),
        ("Edit", CALLS[7], "ask"),
        ("Edit(./**)", CALLS[7], "ask"),
        ("Edit(//**)", CALLS[7], "ask"),
        ("Edit(src/**)", CALLS[7], "allow"),
        ("WebFetch", CALLS[9], "ask"),
        ("WebFetch(domain:example.com)", CALLS[9], "allow"),
        ("WebSearch", CALLS[10], "ask"),
        ("mcp__wiki", CALLS[11], "ask"),
        ("mcp__wiki__*", CALLS[11], "ask"),
        ("mcp__wiki__add", CALLS[11], "allow"),
        ("Read", CALLS[6], "allow"),
        ("Monitor", CALLS[4], "ask"),
        ("Unheard", CALLS[14], "ask"),
    ],
)
def test_without_a_file_what_writes_runs_or_leaves_asks_unless_a_rule_names_it(
    rule: str, call: Any, expected: str
):
    assert verdict(BUILT_IN, rule, call) == expected


def test_the_floors_default_and_its_rules_permit_and_hold():
    permits = Floor(default="always_allow", rules=(Rule(rule="Bash(git push:*)", policy="always_ask"),))
    assert [verdict(permits, "Bash", call) for call in CALLS[:2]] == ["allow", "ask"]
    one = Floor(rules=(Rule(rule="Bash", policy="always_allow"),))
    assert (verdict(one, "Bash", CALLS[0]), verdict(one, "WebSearch", CALLS[10])) == ("allow", "ask")
    never = Floor(default="always_deny")
    assert {verdict(never, "Read", call) for call in CALLS} == {"deny"}


def test_what_is_remembered_answers_an_ask_only_for_exactly_this_call():
    asks = (Rule(rule="Bash(git push:*)", policy="always_ask"),)
    agent = PermissionPolicy(default="always_allow")
    exact = remember_rule(*CALLS[1], HERE)
    wide = Rule(rule="Bash(git:*)", policy="always_allow")
    for floor in (Floor(rules=asks), Floor(default="always_ask")):
        found = [floor.evaluate(agent, *CALLS[1], HERE, remembered=[r]) for r in (exact, wide)]
        assert [f.verdict.value for f in found] == ["allow", "ask"]
        assert found[0].source == str(exact)  # the ledger is told which rule it was
    unheard = Floor(rules=asks, remember=False)
    assert unheard.evaluate(agent, *CALLS[1], HERE, remembered=[exact]).verdict is Verdict.ask
    denied = Floor(rules=(Rule(rule="Bash(git push:*)", policy="always_deny"),))
    assert denied.evaluate(agent, *CALLS[1], HERE, remembered=[exact]).verdict is Verdict.deny


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_file_is_yaml_or_json(tmp_path: Path):
    yaml = "rules:\n  - {rule: 'Bash(rm:*)', policy: always_deny}\ndefault: always_ask\nremember: false\n"
    json = '{"rules": [{"rule": "Bash(rm:*)", "policy": "always_deny"}], "default": "always_ask", "remember": false}'
    assert read_floor(written(tmp_path, yaml)) == read_floor(written(tmp_path, json))
    assert read_floor(written(tmp_path, "")) == read_floor(None) == BUILT_IN
    assert (
        read_floor(written(tmp_path, yaml)).described()
        == "1 rule, default always_ask, nothing remembered counts"
    )
    assert "built in" in BUILT_IN.described()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("default: sometimes", "line 1: default"),
        (
            "rules:\n  - rule: Bash\n    policy: always_deny\n  - rule: bash\n    policy: always_deny",
            "line 4: rules.1",
        ),
        ("rules:\n  - rule: Bash\n    polcy: always_deny", "line 3: rules.0.polcy"),
        ("defaults: always_ask", "line 1: defaults"),
        ("rules: [", "line 1"),
        ("- Bash", "line 1"),
        ("nothing", "line 1"),
        (b"\xff\xfe\x00", "UTF-8"),
        ("a: &a [*a]", "policy.yaml"),
        ("? [a]\n: b", "policy.yaml"),
        ("1: x", "policy.yaml"),
    ],
)
def test_a_wrong_file_is_named_with_its_line_and_field_and_what_to_do(
    tmp_path: Path, text: str | bytes, said: str
):
    with pytest.raises(ConfigError, match=r"^HITL_POLICY: ") as caught:
        read_floor(written(tmp_path, text))
    assert said in str(caught.value)
    assert caught.value.fix


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_floor(path)
