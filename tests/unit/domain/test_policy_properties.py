"""Properties of the permission policy that hold for generated inputs, not only for hand-written examples."""

import os.path
import string
from pathlib import Path
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.policy import (
    PermissionPolicy,
    Rule,
    Verdict,
    evaluate,
    remember_rule,
    validate_remember,
)
from claude_hitl_template.domain.policy.lines import parts

WORKSPACE = Path("/nowhere/workspace")
SHELL_SYNTAX = ";&|<>$(){}`\n\r\\#*?[]~!"
FIELDS = ["command", "file_path", "notebook_path", "path", "pattern", "glob", "url", "query", "description"]
TOOLS = [
    "Bash",
    "Monitor",
    "Read",
    "Write",
    "Edit",
    "NotebookEdit",
    "Glob",
    "Grep",
    "LS",
    "WebFetch",
    "Agent",
]
ALLOW_RULES = [
    "Bash",
    "Bash(git status:*)",
    "Edit(src/**)",
    "Read(//etc/**)",
    "WebFetch(domain:a.com)",
    "mcp__a",
]
DENY_RULES = [
    "Bash(rm:*)",
    "Edit(.env)",
    "Read(~/**)",
    "Read(**/x/**)",
    "WebFetch(domain:b.com)",
    "mcp__a__b",
]

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20)
json_values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
inputs = json_values | st.dictionaries(st.sampled_from(FIELDS), leaves | json_values, max_size=4)
tool_names = st.sampled_from([*TOOLS, "mcp__a__b", "AskUserQuestion", "TodoWrite"]) | st.text(max_size=20)
rules = st.lists(
    st.builds(Rule, rule=st.sampled_from(ALLOW_RULES), policy=st.just("always_allow"))
    | st.builds(
        Rule, rule=st.sampled_from(DENY_RULES), policy=st.sampled_from(["always_ask", "always_deny"])
    ),
    max_size=6,
)
policies = st.builds(
    PermissionPolicy,
    rules=rules.map(tuple),
    default=st.sampled_from([None, "always_allow", "always_ask", "always_deny"]),
)
shell_text = st.text(st.sampled_from(SHELL_SYNTAX + " 'ab=-/\"\t") | st.characters(), max_size=15)


@given(policies, tool_names, inputs)
def test_evaluate_never_raises(policy: PermissionPolicy, tool: str, tool_input: Any) -> None:
    evaluate(policy, tool, tool_input, WORKSPACE)


@given(policies, tool_names, inputs)
def test_deny_always_wins(policy: PermissionPolicy, tool: str, tool_input: Any) -> None:
    if any(
        evaluate(PermissionPolicy(rules=(rule,)), tool, tool_input, WORKSPACE).verdict is Verdict.deny
        for rule in policy.rules
    ):
        assert evaluate(policy, tool, tool_input, WORKSPACE).verdict is Verdict.deny


@given(st.sampled_from(TOOLS), inputs)
def test_nothing_is_allowed_that_has_no_digest(tool: str, tool_input: Any) -> None:
    policy = PermissionPolicy(rules=(Rule(rule=tool, policy="always_allow"),), default="always_allow")
    if evaluate(policy, tool, tool_input, WORKSPACE).verdict is Verdict.allow:
        digest(tool_input)


@given(shell_text, st.sampled_from(SHELL_SYNTAX + "\t\x00\u00a0\u202e\u2028"), shell_text)
@example("", ";", "")
@settings(max_examples=300)
def test_an_allow_pattern_never_matches_a_command_with_shell_syntax(
    before: str, syntax: str, after: str
) -> None:
    policy = PermissionPolicy(
        rules=tuple(Rule(rule=f"Bash(git status{end})", policy="always_allow") for end in ("", ":*", " *"))
    )
    for command in (f"git status{before}{syntax}{after}", f"git status {before}{syntax}{after}"):
        if all(part.command.startswith("git status") for part in parts(command)) and parts(command):
            continue  # a line of such commands
        assert evaluate(policy, "Bash", {"command": command}, WORKSPACE).verdict is Verdict.ask


@given(shell_text)
def test_an_allow_pattern_matches_only_its_own_prefix(rest: str) -> None:
    policy = PermissionPolicy(rules=(Rule(rule="Bash(git status:*)", policy="always_allow"),))
    if evaluate(policy, "Bash", {"command": f"git status{rest}"}, WORKSPACE).verdict is Verdict.allow:
        assert rest == "" or rest.startswith(" ")


# Quoting, redirections and comments may swallow the rest of the line.
plain_text = st.text(st.characters(codec="utf-8", exclude_characters="\\\"'<>#"), max_size=15)


@given(plain_text, st.sampled_from([";", "&&", "|", "\n", "$(", "`", "(", "sudo ", "A=1 ", "bash -c '"]))
def test_a_deny_pattern_matches_whatever_surrounds_a_part_that_begins_with_it(
    before: str, joint: str
) -> None:
    if joint[-1] in " '":
        before = ""  # it would be another program's argument
    policy = PermissionPolicy(
        rules=(Rule(rule="Bash", policy="always_allow"), Rule(rule="Bash(rm -rf:*)", policy="always_deny"))
    )
    command = f"{before}{joint}rm -rf x"
    assert evaluate(policy, "Bash", {"command": command}, WORKSPACE).verdict is Verdict.deny


commands = st.text(st.sampled_from(SHELL_SYNTAX + " 'ab=-/\"\té"), min_size=1, max_size=15)


@given(commands, commands)
@example("*", "rm -rf x")
@example("ls:*", "ls x")
@example("ls *", "ls x")
def test_a_remembered_command_allows_no_other_command(command: str, other: str) -> None:
    rule = remember_rule("Bash", {"command": command}, WORKSPACE)
    policy = PermissionPolicy(rules=(rule,))
    assert evaluate(policy, "Bash", {"command": command}, WORKSPACE).verdict is Verdict.allow
    for stranger in (other, f"{command} {other}", f"{command} "):
        if stranger != command and {part.command for part in parts(stranger)} != {command}:
            assert evaluate(policy, "Bash", {"command": stranger}, WORKSPACE).verdict is Verdict.ask


file_names = st.text(st.sampled_from(string.ascii_letters + "*?[](){}!~./ \\é"), min_size=1, max_size=12)


@given(file_names, file_names)
def test_a_remembered_file_allows_no_other_file(name: str, other: str) -> None:
    rule = remember_rule("Write", {"file_path": name, "content": ""}, WORKSPACE)
    policy = PermissionPolicy(rules=(rule,))
    validate_remember(rule, "Write", {"file_path": name, "content": ""}, WORKSPACE)
    if evaluate(policy, "Write", {"file_path": other, "content": ""}, WORKSPACE).verdict is Verdict.allow:
        same = [(WORKSPACE / os.path.expanduser(path)).resolve() for path in (name, other)]
        assert same[0] == same[1]


@given(st.sampled_from(["Read", "LS", "Glob", "Grep"]), st.sampled_from(["", "a/", "./", "a/b/"]), file_names)
def test_reading_what_resolves_outside_always_asks(tool: str, start: str, name: str) -> None:
    climbing = f"{start}../../../{name.replace('~', '')}"
    tool_input = {"file_path": climbing, "path": climbing, "pattern": "x"}
    if not (WORKSPACE / climbing).resolve().is_relative_to(WORKSPACE):
        assert evaluate(PermissionPolicy(), tool, tool_input, WORKSPACE).verdict is Verdict.ask
