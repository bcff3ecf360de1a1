"""The rules that a human may choose from cover the call, say what they cover, and never everything."""

from pathlib import Path
from typing import Any

import pytest

from claude_hitl_template.domain.policy import PermissionPolicy, Verdict, evaluate
from claude_hitl_template.domain.policy.offers import offers


@pytest.mark.parametrize(
    ("tool", "given", "rules"),
    [
        ("Bash", {"command": "npm test"}, ["Bash(npm test)", "Bash(npm test:*)"]),
        ("Bash", {"command": "npm test -- --watch"}, ["Bash(npm test -- --watch)", "Bash(npm test:*)"]),
        ("Bash", {"command": "ls -l"}, ["Bash(ls -l)", "Bash(ls:*)"]),
        ("Bash", {"command": "python -V"}, ["Bash(python -V)"]),
        ("Skill", {"skill": "x"}, ["Skill", "Skill"]),
        ("Bash", {"command": "date > x && cat x"}, ["Bash"]),
        ("Write", {"file_path": "hello.txt", "content": "x"}, ["Write(./hello.txt)"]),
        ("Write", {"file_path": "src/a/b.py", "content": ""}, ["Write(./src/a/b.py)", "Write(./src/a/**)"]),
        ("Read", {"file_path": "/etc/hosts"}, ["Read(//etc/hosts)", "Read(//etc/**)"]),
        ("Write", {"file_path": ".git/hooks/x", "content": ""}, ["Write(./.git/hooks/x)", "Write(./.git/hooks/**)"]),
        ("WebFetch", {"url": "https://a.example/x", "prompt": "p"}, ["WebFetch(domain:a.example)"]),
        ("WebSearch", {"query": "x"}, ["WebSearch"]),
        ("mcp__wiki__search", {"q": "x"}, ["mcp__wiki__search"]),
        ("Network", {"host": "a.example", "port": 443}, ["Network(a.example:443)"]),
        ("AskUserQuestion", {"questions": []}, []),
        ("ExitPlanMode", {"plan": "x"}, []),
        ("Bash", {"command": 3}, []),
    ],
)  # fmt: skip
def test_what_is_offered_is_narrow_first_and_covers_the_call(
    tmp_path: Path, tool: str, given: dict[str, Any], rules: list[str]
) -> None:
    found = offers(tool, given, tmp_path)
    assert [offer.rule.rule for offer in found] == rules
    for offer in found:
        assert offer.covers
        policy = PermissionPolicy(rules=(offer.rule,), default="always_ask")
        assert evaluate(policy, tool, given, tmp_path).verdict is Verdict.allow


def test_a_wider_rule_covers_what_its_words_say_and_no_more(tmp_path: Path) -> None:
    def allowed(offer: int, tool: str, given: dict[str, Any], other: dict[str, Any]) -> bool:
        policy = PermissionPolicy(rules=(offers(tool, given, tmp_path)[offer].rule,), default="always_ask")
        return evaluate(policy, tool, other, tmp_path).verdict is Verdict.allow

    assert allowed(1, "Bash", {"command": "npm test"}, {"command": "npm test -- a"})
    assert not allowed(0, "Bash", {"command": "npm test"}, {"command": "npm test -- a"})
    assert not allowed(1, "Bash", {"command": "npm test"}, {"command": "npm publish"})
    inside, text = {"file_path": "src/a.py", "content": ""}, {"content": "other"}
    assert allowed(0, "Write", inside, {"file_path": "src/a.py", **text})
    assert allowed(1, "Write", inside, {"file_path": "src/b.py", **text})
    assert not allowed(1, "Write", inside, {"file_path": "b.py", **text})
