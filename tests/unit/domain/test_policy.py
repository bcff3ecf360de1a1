"""The promises of the permission policy, as tables."""

import json
import math
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from pydantic import ValidationError

from claude_hitl_template.domain import missing_dependency
from claude_hitl_template.domain.policy import (
    PermissionPolicy,
    PolicyName,
    Rule,
    Verdict,
    compile_settings,
    evaluate,
    remember_rule,
    validate_remember,
)
from claude_hitl_template.errors import InvalidInput

ALLOW, ASK, DENY = Verdict.allow, Verdict.ask, Verdict.deny


def allowing(*rules: str, default: PolicyName | None = None) -> PermissionPolicy:
    return policy(allow=rules, default=default)


def policy(
    allow: tuple[str, ...] = (),
    ask: tuple[str, ...] = (),
    deny: tuple[str, ...] = (),
    default: PolicyName | None = None,
) -> PermissionPolicy:
    rules = [Rule(rule=rule, policy="always_allow") for rule in allow]
    rules += [Rule(rule=rule, policy="always_ask") for rule in ask]
    rules += [Rule(rule=rule, policy="always_deny") for rule in deny]
    return PermissionPolicy(rules=tuple(rules), default=default)


def bash(command: str, **more: Any) -> dict[str, Any]:
    return {"command": command, **more}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """outside/ next to ws/, which has src/, secrets/, deep/er/est/, with links out, in and to nothing."""
    ws = tmp_path / "ws"
    for folder in ("src/sub", "secrets", "deep/er/est"):
        (ws / folder).mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for file in ("outside/secret.txt", "ws/src/a.py", "ws/secrets/key", "ws/.env", "ws/src/.env"):
        (tmp_path / file).write_text("x")
    (ws / "src/out").symlink_to(tmp_path / "outside")
    (ws / "src/out.txt").symlink_to(tmp_path / "outside/secret.txt")
    (ws / "src/to_secrets").symlink_to(ws / "secrets")
    (ws / "deep_link").symlink_to(ws / "deep/er/est")
    (ws / "loop").symlink_to(ws / "loop")
    return ws


def verdict(rules: PermissionPolicy, tool: str, given: Any, workspace: Path) -> Verdict:
    return evaluate(rules, tool, given, workspace).verdict


# -- precedence and defaults


def test_deny_wins_over_ask_over_allow_over_default(workspace: Path) -> None:
    allow, ask, deny = ("Bash(git:*)",), ("Bash(git push:*)",), ("Bash(git push --force:*)",)
    rules = policy(allow, ask, deny, default="always_deny")
    for command, expected, source in [
        ("git push --force", DENY, "Bash(git push --force:*)"),
        ("git push", ASK, "Bash(git push:*)"),
        ("git status", ALLOW, "Bash(git:*)"),
        ("ls", DENY, "default"),
    ]:
        evaluation = evaluate(rules, "Bash", bash(command), workspace)
        assert (evaluation.verdict, evaluation.source) == (expected, source)


def test_the_order_of_rules_does_not_matter(workspace: Path) -> None:
    rules = policy(allow=("Bash",), deny=("Bash",)).rules
    for order in (rules, rules[::-1]):
        assert verdict(PermissionPolicy(rules=order), "Bash", bash("ls"), workspace) is DENY


@pytest.mark.parametrize(
    ("tool", "given", "expected"),
    [
        ("Bash", {"command": "ls"}, ASK),
        ("Write", {"file_path": "a", "content": ""}, ASK),
        ("Edit", {"file_path": "a", "old_string": "a", "new_string": "b"}, ASK),
        ("MultiEdit", {"file_path": "a", "edits": []}, ASK),
        ("NotebookEdit", {"notebook_path": "a.ipynb", "new_source": ""}, ASK),
        ("WebFetch", {"url": "https://example.com", "prompt": "x"}, ASK),
        ("WebSearch", {"query": "x"}, ASK),
        ("Skill", {"skill": "x"}, ASK),
        ("KillShell", {"shell_id": "1"}, ASK),
        ("TaskStop", {"task_id": "1"}, ASK),
        ("Monitor", {"command": "ls"}, ASK),
        ("SendMessage", {"to": "x"}, ASK),
        ("CronCreate", {"cron": "* * * * *"}, ASK),
        ("EnterWorktree", {}, ASK),
        ("mcp__github__get_me", {}, ASK),
        ("NeverHeardOf", {}, ASK),
        ("bash", {"command": "ls"}, ASK),
        ("", {}, ASK),
        ("AskUserQuestion", {"questions": []}, ASK),
        ("ExitPlanMode", {"plan": "x"}, ASK),
        ("Read", {"file_path": "src/a.py"}, ALLOW),
        ("NotebookRead", {"notebook_path": "src/a.ipynb"}, ALLOW),
        ("LS", {"path": "."}, ALLOW),
        ("Glob", {"pattern": "**/*.py"}, ALLOW),
        ("Grep", {"pattern": "x"}, ALLOW),
        ("TodoWrite", {"todos": []}, ALLOW),
        ("TaskCreate", {"subject": "x"}, ALLOW),
        ("TaskUpdate", {"taskId": "1"}, ALLOW),
        ("TaskList", {}, ALLOW),
        ("TaskGet", {"taskId": "1"}, ALLOW),
        ("TaskOutput", {"task_id": "1"}, ALLOW),
        ("BashOutput", {"bash_id": "1"}, ALLOW),
        ("ToolSearch", {"query": "x"}, ALLOW),
        ("EnterPlanMode", {}, ALLOW),
        ("StructuredOutput", {"answer": 1}, ALLOW),
        ("Agent", {"description": "x", "prompt": "y", "subagent_type": "z"}, ALLOW),
        ("Task", {"description": "x", "prompt": "y"}, ALLOW),
        ("Agent", {"description": "x", "prompt": "y", "isolation": "remote"}, ASK),
        ("Agent", {"description": "x", "prompt": "y", "mode": "bypassPermissions"}, ASK),
    ],
)
def test_built_in_defaults(tool: str, given: dict[str, Any], expected: Verdict, workspace: Path) -> None:
    evaluation = evaluate(PermissionPolicy(), tool, given, workspace)
    assert (evaluation.verdict, evaluation.source) == (expected, "default")


@pytest.mark.parametrize(
    ("default", "tool", "expected"),
    [
        ("always_ask", "Read", ASK),
        ("always_ask", "TodoWrite", ASK),
        ("always_deny", "Read", DENY),
        ("always_deny", "AskUserQuestion", DENY),
        ("always_allow", "Read", ALLOW),
        ("always_allow", "Write", ALLOW),
        ("always_allow", "mcp__a__b", ALLOW),
        ("always_allow", "AskUserQuestion", ASK),
        ("always_allow", "ExitPlanMode", ASK),
    ],
)
def test_a_chosen_default_replaces_the_built_in_ones(
    default: PolicyName, tool: str, expected: Verdict, workspace: Path
) -> None:
    given = {"file_path": "src/a.py", "content": ""}
    assert verdict(PermissionPolicy(default=default), tool, given, workspace) is expected


@pytest.mark.parametrize("tool", ["AskUserQuestion", "ExitPlanMode"])
def test_questions_reach_the_human_whatever_allow_rules_say_but_can_be_denied(
    tool: str, workspace: Path
) -> None:
    assert verdict(allowing(tool, default="always_allow"), tool, {}, workspace) is ASK
    assert verdict(allowing(tool, default="always_deny"), tool, {}, workspace) is ASK
    assert verdict(policy(allow=(tool,), deny=(tool,)), tool, {}, workspace) is DENY


@pytest.mark.parametrize(
    ("tool", "given"),
    [
        ("Bash", {}),
        ("Bash", {"command": None}),
        ("Bash", {"command": ""}),
        ("Bash", {"command": ["ls"]}),
        ("Bash", {"command": "ls \ud800"}),
        ("Bash", {"command": "ls", "timeout": math.nan}),
        ("Bash", "ls"),
        ("Bash", None),
        ("Bash", [1]),
        ("Read", {"path": "src/a.py"}),
        ("Read", {"file_path": 3}),
        ("Read", {"file_path": "src/a.py", "limit": math.inf}),
        ("Write", {"file_path": {"a": 1}, "content": "x"}),
        ("Glob", {"path": "."}),
        ("Glob", {"pattern": "*", "path": 1}),
        ("Grep", {"pattern": "x", "glob": ["*"]}),
        ("WebFetch", {"url": 3}),
        ("mcp__a__b", "text"),
        ("TodoWrite", 1),
        ("Agent", []),
    ],
)
def test_malformed_input_is_never_allowed_and_never_raises(tool: str, given: Any, workspace: Path) -> None:
    assert verdict(allowing(tool), tool, given, workspace) is ASK
    assert verdict(PermissionPolicy(default="always_allow"), tool, given, workspace) is ASK
    assert verdict(PermissionPolicy(default="always_deny"), tool, given, workspace) is DENY
    assert verdict(policy(allow=(tool,), deny=(tool,)), tool, given, workspace) is DENY


def test_nesting_beyond_what_json_can_write_asks(workspace: Path) -> None:
    nested: list[Any] = []
    for _ in range(200_000):
        nested = [nested]
    assert verdict(allowing("Bash"), "Bash", bash("ls", more=nested), workspace) is ASK


def test_any_mapping_will_do_as_input(workspace: Path) -> None:
    assert verdict(allowing("Bash(ls)"), "Bash", MappingProxyType({"command": "ls"}), workspace) is ALLOW


# -- Bash: allow


@pytest.mark.parametrize(
    ("rule", "command"),
    [
        ("Bash", "rm -rf / ; anything > goes"),
        ("Bash(*)", "rm -rf / ; anything > goes"),
        ("Bash(npm test)", "npm test"),
        ("Bash(git status:*)", "git status"),
        ("Bash(git status:*)", "git status -s --branch"),
        ("Bash(git status *)", "git status -s"),
        ("Bash(git status *)", "git status"),
        ("Bash(git commit:*)", "git commit -m 'a word' --author=\"é\""),
    ],
)
def test_an_allow_rule_matches(rule: str, command: str, workspace: Path) -> None:
    assert verdict(allowing(rule), "Bash", bash(command, description="d", timeout=5), workspace) is ALLOW


NASTY = [
    "git statusx",
    "git status; rm -rf /",
    "git status;rm -rf /",
    "git status && x",
    "git status&",
    "git status | sh",
    "git status || x",
    "git status$(x)",
    "git status $(x)",
    "git status `x`",
    "git status ${x}",
    "git status $x",
    "git status > /etc/passwd",
    "git status < x",
    "git status\nrm -rf /",
    "git status \r rm",
    "git status \\\n rm",
    "git status\trm",
    "git status {a,b}",
    "git status (x)",
    "git status # x",
    "git status *",
    "git status a?",
    "git status [a]",
    "git status ~",
    "git status !x",
    "git status 'a;b'",
    'git status "a|b"',
    "git status \x00",
    "git status \x1b[2J",
    "git status\u00a0x",
    "git status \u2028rm",
    "git status \u202erm",
    "git status \u200b",
    "git status \ufeff",
    "A=1 git status",
    "GIT_PAGER=x git status",
    "env git status",
    "sudo git status",
    " git status",
    "git  status",
    "'git' status",
    "git 'status'",
    "git status'x'",
    "/tmp/git status",
    "git",
    "git -c core.pager=x status",
    "\u0261it status",
    "",
    " ",
]


@pytest.mark.parametrize("command", NASTY)
@pytest.mark.parametrize("rule", ["Bash(git status:*)", "Bash(git status *)", "Bash(git status)"])
def test_an_allow_pattern_does_not_match_what_could_run_more(
    rule: str, command: str, workspace: Path
) -> None:
    assert verdict(allowing(rule), "Bash", bash(command), workspace) is ASK


def test_an_exact_allow_rule_does_not_match_more_arguments(workspace: Path) -> None:
    for command in ("npm test --watch", "npm test ", "npm", "npm tes"):
        assert verdict(allowing("Bash(npm test)"), "Bash", bash(command), workspace) is ASK


@pytest.mark.parametrize("field", ["dangerouslyDisableSandbox", "allowed_domains", "anything_new"])
def test_an_allow_pattern_does_not_cover_other_ways_of_running_the_command(
    field: str, workspace: Path
) -> None:
    assert verdict(allowing("Bash(ls:*)"), "Bash", bash("ls", **{field: True}), workspace) is ASK


def test_allowing_bash_does_not_allow_monitor(workspace: Path) -> None:
    assert verdict(allowing("Bash"), "Monitor", bash("ls"), workspace) is ASK


# -- Bash: deny and ask

HIDDEN = [
    "rm -rf /",
    "rm",
    "ls; rm x",
    "ls && rm x",
    "ls || rm x",
    "ls | rm",
    "ls & rm x",
    "ls\nrm x",
    "ls\r\nrm x",
    "(rm x)",
    "{ rm x; }",
    "{rm,-rf,x}",
    "echo $(rm x)",
    "echo `rm x`",
    "diff <(rm x) y",
    "echo ${X:-$(rm x)}",
    "A=1 rm x",
    "A=1 B='2' rm x",
    "A[0]+=1 rm x",
    "sudo rm x",
    "sudo -u root rm x",
    "env -i A=b rm x",
    "command rm x",
    "nohup rm x",
    "time -p rm x",
    "timeout 5 rm x",
    "ls | xargs -n1 rm",
    "find . -exec rm x +",
    "bash -c 'rm x'",
    'sh -c "cd /; rm x"',
    "eval rm x",
    "if true; then rm x; fi",
    "while :; do rm x; done",
    "! rm x",
    "r\\m x",
    "'rm' x",
    'r""m x',
    "r\\\nm x",
    "/bin/rm x",
    "../../bin/rm x",
    ">out rm x",
    "2>/dev/null rm x",
    "> 'a b' rm x",
    "</dev/null sudo rm x",
    "case x in x) rm y;; esac",
    "f() { rm x; }; f",
]


@pytest.mark.parametrize("command", HIDDEN)
def test_a_deny_or_ask_pattern_finds_the_command_wherever_it_stands(command: str, workspace: Path) -> None:
    assert verdict(policy(allow=("Bash",), deny=("Bash(rm:*)",)), "Bash", bash(command), workspace) is DENY
    assert verdict(policy(allow=("Bash",), ask=("Bash(rm:*)",)), "Bash", bash(command), workspace) is ASK
    assert verdict(policy(deny=("Bash(rm:*)",)), "Monitor", bash(command), workspace) is DENY


@pytest.mark.parametrize(
    ("rule", "command"),
    [
        ("Bash(git push)", "git push origin"),
        ("Bash(git push:*)", "git -C /x push"),
        ("Bash(git push:*)", "git -c a.b=c --no-pager push"),
        ("Bash(git push:*)", "git 2>&1 push"),
        ("Bash(git push:*)", "git   push"),
        ("Bash(git push --force:*)", "git push -u origin --force"),
        ("Bash(rm -rf /*)", "rm -rf /home"),
        ("Bash(rm -rf:*)", "rm -v -rf x"),
        ("Bash(curl http://evil.com:*)", "curl -s http://evil.com/x"),
        ("Bash(/usr/bin/rm:*)", "rm x"),
        ("Bash(echo 'a b':*)", 'echo "a b"'),
    ],
)
def test_a_deny_pattern_is_a_prefix_with_room_for_options(rule: str, command: str, workspace: Path) -> None:
    assert verdict(policy(allow=("Bash",), deny=(rule,)), "Bash", bash(command), workspace) is DENY


@pytest.mark.parametrize(
    ("rule", "command"),
    [
        ("Bash(rm:*)", "git rm x"),
        ("Bash(rm:*)", "rmdir x"),
        ("Bash(rm:*)", "echo rm"),
        ("Bash(git push:*)", "git commit -m 'push it'"),
        ("Bash(git push:*)", "git"),
        ("Bash(git push:*)", "git status"),
    ],
)
def test_a_deny_pattern_leaves_other_commands_alone(rule: str, command: str, workspace: Path) -> None:
    assert verdict(policy(allow=("Bash",), deny=(rule,)), "Bash", bash(command), workspace) is ALLOW


def test_a_long_command_is_read_in_good_time(workspace: Path) -> None:
    rules = policy(allow=("Bash",), deny=("Bash(rm -rf:*)",))
    for command in (
        "xargs " + "rm " * 50_000,
        "A=1 " * 50_000,
        "1" * 300_000,
        ">\"'" * 50_000,
        "a[" * 100_000,
    ):
        evaluate(rules, "Bash", bash(command), workspace)


# -- paths


@pytest.mark.parametrize(
    ("tool", "given"),
    [
        ("Read", {"file_path": "src/a.py"}),
        ("Read", {"file_path": "{ws}/src/a.py"}),
        ("Read", {"file_path": "src/../src/a.py"}),
        ("Read", {"file_path": "src/not_there_yet"}),
        ("Read", {"file_path": "src/to_secrets/key"}),
        ("Read", {"file_path": "src/a b [1].py"}),
        ("Glob", {"pattern": "{ws}/src/*.py"}),
        ("Glob", {"pattern": "src/*.{js,ts}"}),
        ("Glob", {"pattern": "src/../secrets/*"}),
        ("Glob", {"pattern": "../secrets/*", "path": "src"}),
        ("Glob", {"pattern": "**/a", "path": "{ws}"}),
        ("Grep", {"pattern": "../etc", "path": "src", "glob": "*.py !*.md"}),
        ("Grep", {"pattern": "/etc/passwd"}),
    ],
)
def test_reading_inside_the_workspace_does_not_ask(tool: str, given: dict[str, str], workspace: Path) -> None:
    placed = {key: value.replace("{ws}", str(workspace)) for key, value in given.items()}
    assert verdict(PermissionPolicy(), tool, placed, workspace) is ALLOW


@pytest.mark.parametrize(
    ("tool", "given"),
    [
        ("Read", {"file_path": "/etc/passwd"}),
        ("Read", {"file_path": "../outside/secret.txt"}),
        ("Read", {"file_path": "src/../../outside/secret.txt"}),
        ("Read", {"file_path": "{ws}/../outside/secret.txt"}),
        ("Read", {"file_path": "{ws}x/a"}),
        ("Read", {"file_path": "~/.ssh/id_rsa"}),
        ("Read", {"file_path": "~root/.ssh/id_rsa"}),
        ("Read", {"file_path": "~\x00/.ssh/id_rsa"}),
        ("Read", {"file_path": "src/out/secret.txt"}),
        ("Read", {"file_path": "src/out.txt"}),
        ("Read", {"file_path": "src/out/not_there_yet"}),
        # The kernel takes `..` after the link, Node before it: one of the two is outside.
        ("Read", {"file_path": "deep_link/../../../outside/secret.txt"}),
        ("Read", {"file_path": "deep_link/../../outside/secret.txt"}),
        ("Read", {"file_path": "loop"}),
        ("Read", {"file_path": "loop/x"}),
        # The CLI trims it.
        ("Read", {"file_path": " /etc/passwd"}),
        ("Read", {"file_path": "\ufeff/etc/passwd"}),
        ("Read", {"file_path": "src/a.py\n"}),
        ("Read", {"file_path": "src/a\x00.py"}),
        ("Read", {"file_path": "src\\..\\..\\x"}),
        ("NotebookRead", {"notebook_path": "/x.ipynb"}),
        ("LS", {"path": "/"}),
        ("LS", {"path": ".."}),
        ("Glob", {"pattern": "/etc/*"}),
        ("Glob", {"pattern": "../*"}),
        ("Glob", {"pattern": "src/*/../../../outside/*"}),
        ("Glob", {"pattern": "{../outside,src}/*"}),
        ("Glob", {"pattern": "{/etc,src}/*"}),
        ("Glob", {"pattern": "{src,~}/*"}),
        ("Glob", {"pattern": "~/*"}),
        ("Glob", {"pattern": "src/out/*"}),
        ("Glob", {"pattern": "*\\.\\./x"}),
        ("Glob", {"pattern": "*", "path": "/etc"}),
        ("Glob", {"pattern": "*", "path": "~"}),
        ("Glob", {"pattern": "*", "path": "src/out"}),
        ("Grep", {"pattern": "x", "path": "/etc"}),
        ("Grep", {"pattern": "x", "path": ".."}),
        ("Grep", {"pattern": "x", "path": "src/out"}),
        ("Grep", {"pattern": "x", "glob": "/etc/*"}),
        ("Grep", {"pattern": "x", "glob": "../*"}),
        ("Grep", {"pattern": "x", "glob": "*.py !../x"}),
    ],
)
def test_reading_outside_the_workspace_asks(tool: str, given: dict[str, str], workspace: Path) -> None:
    placed = {key: value.replace("{ws}", str(workspace)) for key, value in given.items()}
    assert verdict(PermissionPolicy(), tool, placed, workspace) is ASK


def test_home_is_where_it_is(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(workspace))
    assert verdict(PermissionPolicy(), "Read", {"file_path": "~/src/a.py"}, workspace) is ALLOW
    monkeypatch.setenv("HOME", "/elsewhere")
    (workspace / "~").mkdir()
    for tool, given in (("Read", {"file_path": "~/x"}), ("Grep", {"pattern": "x", "path": "~"})):
        assert verdict(PermissionPolicy(), tool, given, workspace) is ASK


def test_a_workspace_reached_through_a_symlink_is_the_same_workspace(workspace: Path) -> None:
    link = workspace.parent / "link"
    link.symlink_to(workspace)
    for place in (link, workspace):
        assert verdict(PermissionPolicy(), "Read", {"file_path": str(place / "src/a.py")}, link) is ALLOW
        assert (
            verdict(allowing("Edit(src/**)"), "Edit", {"file_path": str(place / "src/a.py")}, link) is ALLOW
        )


@pytest.mark.parametrize(
    ("rule", "tool", "path", "expected"),
    [
        ("Edit(src/**)", "Edit", "src/a.py", ALLOW),
        ("Edit(src/**)", "Write", "src/sub/new.py", ALLOW),
        ("Edit(src/**)", "MultiEdit", "src/a.py", ALLOW),
        ("Edit(src/**)", "NotebookEdit", "src/n.ipynb", ALLOW),
        ("Edit(./src/**)", "Edit", "./src/../src/a.py", ALLOW),
        ("Edit(src/)", "Edit", "src/sub/x", ALLOW),
        ("Edit(./**)", "Edit", "any/where", ALLOW),
        ("Edit(.)", "Edit", "any/where", ALLOW),
        ("Edit(**/*.py)", "Edit", "src/sub/x.py", ALLOW),
        ("Edit(**/*.py)", "Edit", "x.py", ALLOW),
        ("Edit(src/**/x.?y)", "Edit", "src/a/b/x.py", ALLOW),
        ("Edit(//{ws}/src/a.py)", "Edit", "src/a.py", ALLOW),
        ("Edit(src/to_secrets/**)", "Edit", "secrets/key", ASK),
        ("Edit(secrets/**)", "Edit", "src/to_secrets/key", ALLOW),
        ("Edit", "Write", "/etc/passwd", ALLOW),
        ("Write(src/**)", "Write", "src/a.py", ALLOW),
        ("Write(src/**)", "Edit", "src/a.py", ASK),
        ("Edit(src/*)", "Edit", "src/sub/x", ASK),
        ("Edit(src)", "Edit", "src/a.py", ASK),
        ("Edit(src/**)", "Edit", "src", ASK),
        ("Edit(src/**)", "Edit", "srcs/a.py", ASK),
        ("Edit(a.py)", "Edit", "src/a.py", ASK),
        ("Edit(src/**)", "Edit", "src/../secrets/key", ASK),
        ("Edit(src/**)", "Edit", "src/out/secret.txt", ASK),
        ("Edit(src/**)", "Edit", "src/out.txt", ASK),
        ("Edit(src/**)", "Edit", "src/to_secrets/key", ASK),
        ("Edit(deep/**)", "Edit", "deep_link/../x", ASK),
        ("Edit(src/**)", "Edit", " src/a.py", ASK),
        ("Edit(src/**)", "Edit", "src/a\n.py", ASK),
        ("Read(src/**)", "Edit", "src/a.py", ASK),
        # What is written there may run, or change the rules.
        ("Edit", "Write", ".claude/settings.json", ASK),
        ("Edit(./**)", "Write", ".claude/settings.local.json", ASK),
        ("Edit(./**)", "Write", "src/../.git/hooks/pre-commit", ASK),
        ("Edit(./**)", "Write", "sub/.mcp.json", ASK),
        ("Edit(./**)", "Write", ".CLAUDE/settings.json", ASK),
        ("Edit(.claude/commands/*)", "Write", ".claude/commands/x.md", ALLOW),
    ],
)
def test_an_allow_rule_for_paths(rule: str, tool: str, path: str, expected: Verdict, workspace: Path) -> None:
    field = "notebook_path" if tool == "NotebookEdit" else "file_path"
    rules = allowing(rule.replace("//{ws}", f"/{workspace}"))
    assert verdict(rules, tool, {field: path}, workspace) is expected


def test_an_allow_rule_for_home(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(workspace.parent / "outside"))
    for path in ("~/secret.txt", "../outside/secret.txt"):
        assert verdict(allowing("Read(~/*.txt)"), "Read", {"file_path": path}, workspace) is ALLOW
    assert verdict(allowing("Read(~/*.txt)"), "Read", {"file_path": "../x.txt"}, workspace) is ASK


@pytest.mark.parametrize(
    ("rule", "tool", "given", "expected"),
    [
        ("Read(//etc/**)", "Glob", {"pattern": "*", "path": "/etc"}, ALLOW),
        ("Read(//etc/**)", "Glob", {"pattern": "/etc/*.conf"}, ALLOW),
        ("Read(//etc/**)", "Grep", {"pattern": "x", "path": "/etc"}, ALLOW),
        ("Read(//etc/*)", "Grep", {"pattern": "x", "path": "/etc"}, ASK),
        ("Read(//etc/a/**)", "Grep", {"pattern": "x", "path": "/etc"}, ASK),
        ("Read(//etc/**)", "Glob", {"pattern": "*/../../root/*", "path": "/etc"}, ASK),
        ("Read", "Grep", {"pattern": "x", "path": "/etc"}, ALLOW),
        ("Grep", "Glob", {"pattern": "*", "path": "/etc"}, ASK),
    ],
)
def test_an_allow_rule_for_reading_covers_searches_of_all_that_lies_below(
    rule: str, tool: str, given: dict[str, str], expected: Verdict, workspace: Path
) -> None:
    assert verdict(allowing(rule), tool, given, workspace) is expected


@pytest.mark.parametrize(
    ("rule", "path"),
    [
        ("Read(./secrets/**)", "secrets/key"),
        ("Read(secrets)", "secrets/key"),
        ("Read(./secrets)", "secrets/deep/er"),
        ("Read(./secrets/**)", "src/to_secrets/key"),
        ("Read(./secrets/**)", "src/../secrets/key"),
        ("Read(./secrets/**)", " secrets/key"),
        ("Read(./src/to_secrets/**)", "secrets/key"),
        ("Read(src/out/**)", "../outside/secret.txt"),
        ("Read(src/out/**)", "src/out/secret.txt"),
        ("Read(.env)", ".env"),
        ("Read(.env)", "src/.env"),
        ("Read(*.env)", "src/.env"),
        ("Read(//etc/**)", "/etc/passwd"),
        ("Read(**/key)", "secrets/key"),
        ("Read(~/**)", "~/x"),
        ("Read", "src/a.py"),
    ],
)
def test_a_deny_rule_for_paths_matches_every_reading(rule: str, path: str, workspace: Path) -> None:
    rules = policy(allow=("Read",), deny=(rule,))
    assert verdict(rules, "Read", {"file_path": path}, workspace) is DENY


def test_a_deny_rule_for_paths_leaves_other_files_alone(workspace: Path) -> None:
    for rule in ("Read(./secrets/**)", "Read(./.env)", "Edit(./**)", "Read(//etc/**)"):
        assert verdict(policy(deny=(rule,)), "Read", {"file_path": "src/.env"}, workspace) is ALLOW


@pytest.mark.parametrize("tool", ["Edit", "Write", "MultiEdit", "NotebookEdit"])
def test_a_deny_rule_for_edit_covers_all_editing_tools(tool: str, workspace: Path) -> None:
    rules = policy(allow=(tool,), deny=("Edit(src/**)",))
    given = {"file_path": "src/a.py", "notebook_path": "src/a.py"}
    assert verdict(rules, tool, given, workspace) is DENY


@pytest.mark.parametrize(
    ("tool", "given"),
    [
        ("Glob", {"pattern": "*", "path": "secrets"}),
        ("Glob", {"pattern": "secrets/*"}),
        ("Grep", {"pattern": "x", "path": "secrets"}),
        ("Grep", {"pattern": "x", "glob": "secrets/*"}),
        ("LS", {"path": "secrets"}),
    ],
)
def test_a_deny_rule_for_reading_covers_searches_in_the_place(
    tool: str, given: dict[str, str], workspace: Path
) -> None:
    assert verdict(policy(deny=("Read(./secrets/**)",)), tool, given, workspace) is DENY


def test_a_grep_that_may_reach_what_must_be_asked_for_asks(workspace: Path) -> None:
    rules = policy(ask=("Read(./secrets/**)",))
    assert verdict(rules, "Grep", {"pattern": "x"}, workspace) is ASK
    assert verdict(rules, "Grep", {"pattern": "x", "path": "src/sub"}, workspace) is ALLOW
    assert verdict(rules, "Glob", {"pattern": "*"}, workspace) is ALLOW


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", ALLOW),
        ("src/**/*.py", ALLOW),
        ("*.{js,ts}", ALLOW),
        ("x*/y", ALLOW),
        ("*/*", ASK),
        ("**", ASK),
        ("**/key", ASK),
        ("s*/k*", ASK),
        ("SEC*/k*", ASK),
        ("{secrets,src}/*", ASK),
        ("[s]ecrets/*", ASK),
        ("secrets/**", ASK),
        ("src/../secrets/*", ASK),
    ],
)
def test_a_search_for_names_in_what_must_be_asked_for_asks(
    pattern: str, expected: Verdict, workspace: Path
) -> None:
    rules = policy(ask=("Read(./secrets/**)",))
    assert verdict(rules, "Glob", {"pattern": pattern}, workspace) is expected


@pytest.mark.parametrize(
    ("rule", "path"),
    [
        ("Read(./secrets/**)", "SECRETS/key"),
        ("Read(./Secrets/**)", "secrets/key"),
        ("Read(.env)", "src/.ENV"),
        ("Read(*.PEM)", "src/a.pem"),
        ("Read(./caf\u00e9/**)", "cafe\u0301/x"),
        ("Read(./cafe\u0301/**)", "CAF\u00c9/x"),
        ("Read(./secrets/**)", "secrets//key"),
        ("Read(./secrets/**)", ".//secrets/./key"),
        ("Read(./secrets/**)", "secrets/"),
        ("Read(./secrets/key)", "secrets/key/"),
        ("Read(./secrets/**)", "/{ws}/secrets/key"),
    ],
)
def test_a_deny_rule_for_paths_holds_where_case_and_accents_make_no_difference(
    rule: str, path: str, workspace: Path
) -> None:
    placed = path.replace("{ws}", str(workspace))
    assert verdict(policy(allow=("Read",), deny=(rule,)), "Read", {"file_path": placed}, workspace) is DENY


def test_an_allow_rule_for_paths_knows_no_other_case(workspace: Path) -> None:
    assert verdict(allowing("Edit(src/**)"), "Edit", {"file_path": "SRC/a.py"}, workspace) is ASK


# -- WebFetch


@pytest.mark.parametrize(
    ("url", "is_good"),
    [
        ("https://good.com", True),
        ("http://good.com/x?y=evil.com#z", True),
        ("https://api.good.com/@user", True),
        ("https://GOOD.com.:8443/x", True),
        ("https://good.com@evil.com", False),
        ("https://good.com:x@evil.com/", False),
        ("https://user@good.com/", False),
        ("https://evil.com/good.com", False),
        ("https://evil.com?good.com", False),
        ("https://evil.com#.good.com", False),
        ("https://evil.com\\.good.com", False),
        ("https://evil.com\\@good.com", False),
        ("https://notgood.com", False),
        ("https://good.com.evil.com", False),
        ("https://good.com%2eevil.com", False),
        ("https://good.com\t.evil.com", False),
        ("https://good.com\n", False),
        (" https://good.com", False),
        ("https://good。com", False),
        ("https://ɡood.com", False),
        ("https://good.com:port", False),
        ("https://[good.com", False),
        ("https:///good.com", False),
        ("https:good.com", False),
        ("//good.com", False),
        ("good.com", False),
        ("file://good.com/etc/passwd", False),
        ("javascript://good.com/%0aalert(1)", False),
        ("", False),
    ],
)
def test_an_allow_rule_for_a_domain(url: str, is_good: bool, workspace: Path) -> None:
    rules = allowing("WebFetch(domain:Good.com)")
    assert verdict(rules, "WebFetch", {"url": url, "prompt": "p"}, workspace) is (ALLOW if is_good else ASK)


@pytest.mark.parametrize(
    "url",
    [
        "https://evil.com",
        "https://www.EVIL.com./x",
        "https://good.com@evil.com",
        "https://evil.com@good.com",
        "https://evil.com\\@good.com",
        "https://evil。com",
        "https://ｅvil.com",
        "https://ev%69l.com",
        "https://ev\til.com",
        "evil.com",
        "https:/evil.com",
    ],
)
def test_a_deny_rule_for_a_domain_matches_every_reading(url: str, workspace: Path) -> None:
    rules = policy(allow=("WebFetch",), deny=("WebFetch(domain:evil.com)",))
    assert verdict(rules, "WebFetch", {"url": url}, workspace) is DENY
    assert verdict(rules, "WebFetch", {"url": "https://good.com/?q=evil.com"}, workspace) is ALLOW


# -- MCP


@pytest.mark.parametrize(
    ("rule", "tool", "allowed", "denied"),
    [
        ("mcp__a", "mcp__a__x", True, True),
        ("mcp__a__*", "mcp__a__x", True, True),
        ("mcp__a__x", "mcp__a__x", True, True),
        ("mcp__a", "mcp__ab__x", False, False),
        ("mcp__a__x", "mcp__a__y", False, False),
        ("mcp__a__x", "mcp__a__xy", False, False),
        ("mcp__a", "mcp__a__evil__x", False, True),
        ("mcp__a", "mcp__a___x", False, True),
        ("mcp__a__x", "mcp__a__x__y", False, True),
        ("mcp__a__x__*", "mcp__a__x__y", True, True),
        ("mcp__a", "mcp__a", True, True),
    ],
)
def test_mcp_rules(rule: str, tool: str, allowed: bool, denied: bool, workspace: Path) -> None:
    assert verdict(allowing(rule), tool, {}, workspace) is (ALLOW if allowed else ASK)
    assert verdict(policy(deny=(rule,)), tool, {}, workspace) is (DENY if denied else ASK)


# -- the notation


@pytest.mark.parametrize("name", ["always_allow", "always_ask", "always_deny"])
@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("Bash(", "write `Tool`"),
        ("Bash)", "write `Tool`"),
        ("Bash(a))", "write `Tool`"),
        ("Bash(a) b", "write `Tool`"),
        ("Bash(a)(b)", "write `Tool`"),
        ("Bash()", "empty pattern"),
        ("Bash(:*)", "names no simple command"),
        ("Bash( ls)", "spaces"),
        ("Bash(ls\x00)", "control"),
        ("Bash(ls\n)", "control"),
        ("Bash(ls\u202e)", "control"),
        ("Bash(git * main)", "only at the end"),
        ("Bash(* --force)", "only at the end"),
        ("Bash(a && b)", "simple command"),
        ("Bash(a | b:*)", "simple command"),
        ("Bash($X)", "simple command"),
        ("bash(ls)", "case-sensitive: write `Bash`"),
        ("webfetch", "case-sensitive: write `WebFetch`"),
        ("Bash ls", "is not a rule"),
        (" Bash", "is not a rule"),
        ("*", "is not a rule"),
        ("9Lives", "is not a rule"),
        ("Skill(x)", "takes no pattern"),
        ("WebSearch(x)", "takes no pattern"),
        ("Read(*)", "every path"),
        ("Read(/etc/passwd)", "write `//`"),
        ("Read(~root/x)", "your own home"),
        ("Read(../x)", "in place of `..`"),
        ("Read(src/[ab])", "wildcards"),
        ("Read(!x)", "wildcards"),
        ("Read({a,b})", "wildcards"),
        ("WebFetch(example.com)", "domain:example.com"),
        ("WebFetch(domain:)", "domain:example.com"),
        ("WebFetch(domain:*.x.com)", "subdomains included"),
        ("WebFetch(domain:https://x.com)", "domain:example.com"),
        ("mcp__", "mcp__server"),
        ("mcp__*", "mcp__server"),
        ("mcp__a__get_*", "mcp__server"),
        ("mcp__a__b(x)", "mcp__server"),
        ("A" * 2001, "2000"),
    ],
)
def test_a_rule_that_is_not_understood_is_refused_with_a_mend(rule: str, says: str, name: PolicyName) -> None:
    with pytest.raises(ValueError) as caught:
        Rule(rule=rule, policy=name)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "rule", ["Bash(ls*)", "Bash(ls ~)", "Bash(A=1 ls)", "Bash(rm -rf /*)", "Bash(ls # x)"]
)
def test_an_allow_rule_that_could_never_match_is_refused(rule: str) -> None:
    with pytest.raises(ValueError, match=r"simple command|only at the end"):
        Rule(rule=rule, policy="always_allow")
    assert Rule(rule=rule, policy="always_deny")


def test_rules_and_policies_are_frozen_and_refuse_unknown_fields() -> None:
    with pytest.raises(ValidationError):
        Rule.model_validate({"rule": "Bash", "policy": "always_allow", "extra": 1})
    with pytest.raises(ValidationError):
        Rule.model_validate({"rule": "Bash", "policy": "sometimes"})
    with pytest.raises(ValidationError):
        PermissionPolicy.model_validate({"rule": []})
    with pytest.raises(ValidationError):
        Rule(rule="Bash", policy="always_allow").policy = "always_deny"
    for rule in ("Bash(ls)", "Bash(*)", "mcp__a__*"):
        with pytest.raises(ValidationError, match="leave one of them out"):
            Rule(rule=rule, policy="always_allow", digest="0" * 64)
    with pytest.raises(ValidationError):
        Rule(rule="Bash", policy="always_allow", digest="0" * 63)


def test_a_policy_survives_json() -> None:
    rules = policy(allow=("Bash(ls:*)",), deny=("Read(.env)",), default="always_ask")
    assert PermissionPolicy.model_validate_json(rules.model_dump_json()) == rules


# -- allow and remember


@pytest.mark.parametrize(
    ("tool", "given", "rule"),
    [
        ("Bash", {"command": "npm test", "description": "run"}, "Bash(npm test)"),
        ("Write", {"file_path": "src/new.py", "content": "x"}, "Write(./src/new.py)"),
        ("Edit", {"file_path": "{ws}/src/a.py", "old_string": "x"}, "Edit(./src/a.py)"),
        ("NotebookEdit", {"notebook_path": "n.ipynb"}, "NotebookEdit(./n.ipynb)"),
        ("Read", {"file_path": "/etc/hosts"}, "Read(//etc/hosts)"),
        ("Write", {"file_path": ".claude/x", "content": ""}, "Write(./.claude/x)"),
        (
            "WebFetch",
            {"url": "https://Docs.Example.com/x", "prompt": "p"},
            "WebFetch(domain:docs.example.com)",
        ),
        ("mcp__a__b", {"x": 1}, "mcp__a__b"),
    ],
)
def test_remembering_uses_the_notation_where_it_can(
    tool: str, given: dict[str, str], rule: str, workspace: Path
) -> None:
    placed = json.loads(json.dumps(given).replace("{ws}", str(workspace)))
    assert remember_rule(tool, placed, workspace) == Rule(rule=rule, policy="always_allow")


@pytest.mark.parametrize(
    ("tool", "given"),
    [
        ("Bash", {"command": "a && b | c > d"}),
        ("Bash", {"command": "*"}),
        ("Bash", {"command": "ls:*"}),
        ("Bash", {"command": "ls *"}),
        ("Bash", {"command": " ls"}),
        ("Bash", {"command": "ls\nrm"}),
        ("Bash", {"command": "x" * 5000}),
        ("Bash", {"command": "ls", "dangerouslyDisableSandbox": True}),
        ("Write", {"file_path": ".", "content": ""}),
        ("Write", {"file_path": "/", "content": ""}),
        ("Write", {"file_path": "a*.py", "content": ""}),
        ("Write", {"file_path": "a(b).py", "content": ""}),
        ("Write", {"file_path": "[slug].tsx", "content": ""}),
        ("WebFetch", {"url": "https://a@b.com", "prompt": "p"}),
        ("WebSearch", {"query": "x"}),
        ("Skill", {"skill": "x"}),
        ("Agent", {"prompt": "x", "isolation": "remote"}),
        ("Glob", {"pattern": "/etc/*"}),
        ("mcp__a", {}),
        ("Unknown", {}),
    ],
)
def test_remembering_otherwise_binds_the_exact_call(
    tool: str, given: dict[str, Any], workspace: Path
) -> None:
    rule = remember_rule(tool, given, workspace)
    assert (rule.rule, rule.policy) == (tool, "always_allow")
    assert rule.digest is not None
    validate_remember(rule, tool, given, workspace)
    rules = PermissionPolicy(rules=(rule,))
    assert verdict(rules, tool, given, workspace) is ALLOW
    assert str(rule.digest)[:12] in evaluate(rules, tool, given, workspace).source
    for key, value in given.items():
        if key != "content":  # a remembered file may get any
            assert verdict(rules, tool, {**given, key: f"{value}x"}, workspace) is ASK
    assert verdict(rules, f"{tool}2", given, workspace) is ASK


def test_a_remembered_command_is_that_command_however_the_model_describes_it(workspace: Path) -> None:
    rules = PermissionPolicy(rules=(remember_rule("Bash", bash("a; b", description="one"), workspace),))
    assert verdict(rules, "Bash", bash("a; b", description="two", timeout=9), workspace) is ALLOW
    assert verdict(rules, "Bash", bash("a; b", run_in_background=True), workspace) is ASK
    assert verdict(rules, "Bash", bash("a;b"), workspace) is ASK


@pytest.mark.parametrize("name", ["a.py", "a*.py"])
def test_a_remembered_file_is_that_file_with_any_content_in_a_workspace_that_moved(
    name: str, workspace: Path, tmp_path: Path
) -> None:
    rule = remember_rule("Write", {"file_path": str(workspace / name), "content": "1"}, workspace)
    moved = tmp_path / "moved"
    moved.mkdir()
    rules = PermissionPolicy(rules=(rule,))
    assert verdict(rules, "Write", {"file_path": str(moved / name), "content": "2"}, moved) is ALLOW
    assert verdict(rules, "Write", {"file_path": "ab.py", "content": "1"}, moved) is ASK
    assert verdict(rules, "Write", {"file_path": str(workspace / name), "content": "1"}, moved) is ASK


def test_remembering_a_symlink_remembers_where_it_leads(workspace: Path) -> None:
    rule = remember_rule("Edit", {"file_path": "src/out.txt"}, workspace)
    assert rule.rule == f"Edit(/{workspace.parent}/outside/secret.txt)"


@pytest.mark.parametrize(
    ("tool", "given"),
    [
        ("Bash", {}),
        ("Bash", None),
        ("AskUserQuestion", {}),
        ("ExitPlanMode", {}),
        ("no such name!", {}),
        ("", {}),
    ],
)
def test_what_cannot_be_remembered_says_so(tool: str, given: Any, workspace: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        remember_rule(tool, given, workspace)
    assert caught.value.field == "remember"


@pytest.mark.parametrize(
    ("rule", "name", "tool", "given", "says"),
    [
        ("Bash(git:*)", "always_ask", "Bash", {"command": "git x"}, "always_allow"),
        ("Bash(git:*)", "always_allow", "Bash", {"command": "npm x"}, "does not match"),
        ("Bash(git:*)", "always_allow", "Bash", {"command": "git x; y"}, "does not match"),
        ("Edit(src/**)", "always_allow", "Edit", {"file_path": "x"}, "does not match"),
        ("Bash", "always_allow", "Bash", {}, "does not match"),
        ("AskUserQuestion", "always_allow", "AskUserQuestion", {}, "question"),
    ],
)
def test_a_humans_own_rule_must_allow_the_call_at_hand(
    rule: str, name: PolicyName, tool: str, given: Any, says: str, workspace: Path
) -> None:
    with pytest.raises(InvalidInput, match=says) as caught:
        validate_remember(Rule(rule=rule, policy=name), tool, given, workspace)
    assert caught.value.field == "remember"


def test_a_humans_own_rule_may_be_wider_than_the_call(workspace: Path) -> None:
    validate_remember(Rule(rule="Bash(npm:*)", policy="always_allow"), "Bash", bash("npm test"), workspace)


# -- the CLI's settings


def test_settings_ask_for_every_tool_deny_what_is_denied_and_allow_nothing() -> None:
    forbidden = Rule(rule="Bash", policy="always_deny", digest="0" * 64)
    rules = policy(allow=("Bash(ls)", "Read"), ask=("Edit",), deny=("Bash(rm:*)", "Read(.env)", "Read(.env)"))
    rules = rules.model_copy(update={"rules": (*rules.rules, forbidden)})
    assert compile_settings(rules, ["Bash", "Read", "TodoWrite", "Bash"], ["github", "my server.v2"]) == {
        "permissions": {
            "ask": ["Bash", "Read", "TodoWrite", "mcp__github", "mcp__my_server_v2"],
            "deny": ["Bash(rm:*)", "Read(.env)"],
        }
    }


def test_a_denied_digest_denies_that_call_only(workspace: Path) -> None:
    remembered = remember_rule("Bash", bash("a; b"), workspace)
    forbidden = Rule(rule="Bash", policy="always_deny", digest=remembered.digest)
    rules = PermissionPolicy(rules=(forbidden,), default="always_allow")
    assert verdict(rules, "Bash", bash("a; b"), workspace) is DENY
    assert verdict(rules, "Bash", bash("a; c"), workspace) is ALLOW


# -- reports of what is missing


@pytest.mark.parametrize("default", [None, "always_ask", "always_deny", "always_allow"])
def test_a_report_of_a_missing_tool_asks_nobody(default: PolicyName | None, workspace: Path) -> None:
    for made in (policy(default=default), policy(ask=("mcp__hitl",), default=default)):
        assert evaluate(made, missing_dependency.FULL_NAME, {}, workspace).verdict is ALLOW


def test_a_report_can_be_denied_and_no_other_tool_passes_for_one(workspace: Path) -> None:
    assert evaluate(policy(deny=("mcp__hitl",)), missing_dependency.FULL_NAME, {}, workspace).verdict is DENY
    for name in (
        "mcp__hitl__other",
        "mcp__hitl",
        "mcp__hitl__report_missing_dependency2",
        missing_dependency.TOOL,
        "mcp__HITL__x",
    ):
        assert evaluate(PermissionPolicy(), name, {}, workspace).verdict is ASK
