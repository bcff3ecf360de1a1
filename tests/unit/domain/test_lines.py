"""A command line is judged by its commands: which one asks is shown, and a rule may answer for one of them."""

import random
import shlex
import subprocess
from pathlib import Path

import pytest

from claude_hitl_template.domain.policy import (
    Evaluation,
    PermissionPolicy,
    Rule,
    Verdict,
    evaluate,
)
from claude_hitl_template.domain.policy.command_segments import MOST, asking, judged_segments
from claude_hitl_template.domain.policy.floor import BUILT_IN, Floor
from claude_hitl_template.domain.policy.lines import parts
from claude_hitl_template.domain.policy.offers import check_granted, granted, offers
from claude_hitl_template.errors import InvalidInput

WORKSPACE = Path("/workspace")


def _policy(*allowed: str, asked: tuple[str, ...] = ()) -> PermissionPolicy:
    return PermissionPolicy(
        rules=(
            *(Rule(rule=text, policy="always_allow") for text in allowed),
            *(Rule(rule=text, policy="always_ask") for text in asked),
        )
    )


def _verdict(policy: PermissionPolicy, line: str) -> Verdict:
    return evaluate(policy, "Bash", {"command": line}, WORKSPACE).verdict


@pytest.mark.parametrize(
    ("line", "commands"),
    [
        ("git status && rm -rf x", ["git status", "rm -rf x"]),
        ("make || make clean; make", ["make", "make clean", "make"]),
        ("npm test 2>&1 | tail -20", ["npm test", "tail -20"]),
        ("a >/dev/null 2>&1\nb", ["a", "b"]),
        ("git log | grep x | wc -l", ["git log", "grep x", "wc -l"]),
        ("git commit -m 'two words' && git push", ["git commit -m 'two words'", "git push"]),
        ("a &&\n  b ;", ["a", "b"]),
    ],
)
def test_a_line_of_simple_commands_is_taken_apart(line: str, commands: list[str]) -> None:
    assert [part.command for part in parts(line)] == commands


@pytest.mark.parametrize(
    "line",
    [
        "git status",  # a single command
        "cd /other && make",  # the next one would run elsewhere
        "pushd x; make",
        "'cd' x && make",
        "export PATH=/tmp && make",
        "PATH=/tmp; make",
        "alias make=rm; make",
        "source x && make",
        ". x && make",
        "printf -v PATH /tmp; make",
        "unset HOME; make",
        "set -a; make",
        "command cd x; make",
        "builtin cd x; make",
        "exec make; x",
        "read x; make",
        "cat x | sh",  # what it reads may be a program
        "cat x | python3",
        "cat x | xargs rm",
        "cat x | tee y",
        "cat x | ./cat",
        "cat x | sed -n p",
        "a & b",
        "a |& b",
        "a > file && b",
        "a < file; b",
        "a 2>errors; b",
        "a &> /dev/null; b",
        "echo $(b); c",
        "echo `b`; c",
        "a <(b); c",
        "(a; b)",
        "{ a; b; }",
        "if a; then b; fi",
        "while a; do b; done",
        "for x in a b; do c; done",
        "f() { a; }; f",
        "! a; b",
        "time a; b",
        "a # ; b",
        'a "x && y"; b',  # quoted signs are too much to be sure of
        "a 'x; b",
        "a; b \\\n c",
        "a;; b",
        "a <<x; b\nx",
        "a; b\x00",
        "a\rb; c",
        "a && *",
    ],
)
def test_a_line_that_may_be_more_than_its_commands_is_not_taken_apart(line: str) -> None:
    assert parts(line) == ()


def test_a_line_is_allowed_when_each_of_its_commands_is() -> None:
    policy = _policy("Bash(git status:*)", "Bash(npm test)", "Bash(tail:*)")
    assert _verdict(policy, "git status -s && npm test 2>&1 | tail -3") is Verdict.allow
    found = evaluate(policy, "Bash", {"command": "npm test; git status"}, WORKSPACE)
    assert found == Evaluation(Verdict.allow, "Bash(npm test) && Bash(git status:*)")
    for line in (
        "git status && rm x",
        "git status; npm test -- x",
        "git status | npm test",
        "cd x && npm test",
    ):
        assert _verdict(policy, line) is Verdict.ask, line
    more = {"command": "git status; npm test", "dangerouslyDisableSandbox": True}
    assert evaluate(policy, "Bash", more, WORKSPACE).verdict is Verdict.ask
    elsewhere = evaluate(
        _policy("Bash(./a)", "Bash(b)"), "Bash", {"command": "./a; b"}, WORKSPACE, WORKSPACE / "x"
    )
    assert elsewhere.verdict is Verdict.ask


def test_a_rule_that_asks_or_denies_holds_in_a_line_whatever_allows_its_commands() -> None:
    asked = _policy("Bash(git:*)", "Bash(make)", asked=("Bash(git push:*)",))
    assert _verdict(asked, "make && git push") is Verdict.ask
    denied = PermissionPolicy(rules=(*asked.rules, Rule(rule="Bash(git push:*)", policy="always_deny")))
    assert _verdict(denied, "make && git push") is Verdict.deny


def test_under_the_built_in_floor_a_remembered_command_completes_a_line() -> None:
    policy = _policy("Bash(git status:*)")
    line = {"command": "git status && rm -rf x"}

    def with_(*texts: str) -> Evaluation:
        rules = [Rule(rule=text, policy="always_allow") for text in texts]
        return BUILT_IN.evaluate(policy, "Bash", line, WORKSPACE, remembered=rules)

    assert with_().verdict is Verdict.ask
    assert with_("Bash(rm -rf x)") == Evaluation(Verdict.allow, "Bash(git status:*) && Bash(rm -rf x)")
    assert with_("Bash(rm -rf y)").verdict is Verdict.ask
    wide = PermissionPolicy(default="always_allow")
    remembered = [Rule(rule="Bash(rm -rf x)", policy="always_allow")]
    found = BUILT_IN.evaluate(wide, "Bash", line, WORKSPACE, remembered=remembered)
    assert found.verdict is Verdict.ask, "what the agent's default allows, the floor still asks for"


def test_under_an_operators_file_each_command_of_a_line_is_answered_as_if_it_were_alone() -> None:
    policy = _policy("Bash(git status)", "Bash(make)")
    line = {"command": "git status && rm x"}
    exact = [Rule(rule="Bash(rm x)", policy="always_allow")]
    asks = Floor(rules=(Rule(rule="Bash(rm:*)", policy="always_ask"),))
    assert asks.evaluate(policy, "Bash", line, WORKSPACE, remembered=exact).verdict is Verdict.allow
    prefix = [Rule(rule="Bash(rm:*)", policy="always_allow")]
    assert asks.evaluate(policy, "Bash", line, WORKSPACE, remembered=prefix).verdict is Verdict.ask
    nothing = Floor(rules=asks.rules, remember=False)
    assert nothing.evaluate(policy, "Bash", line, WORKSPACE, remembered=exact).verdict is Verdict.ask
    by_default = Floor(default="always_ask")
    assert by_default.evaluate(policy, "Bash", line, WORKSPACE, remembered=exact).verdict is Verdict.ask
    denies = Floor(rules=(Rule(rule="Bash(rm:*)", policy="always_deny"),))
    assert denies.evaluate(policy, "Bash", line, WORKSPACE, remembered=exact).verdict is Verdict.deny


# -- which command asks


def _judged(policy: PermissionPolicy, line: str) -> list[tuple[str, str, str]]:
    def judge(command: str) -> Evaluation:
        return BUILT_IN.evaluate(policy, "Bash", {"command": command}, WORKSPACE)

    found = judged_segments(line, [judge(line)], judge)
    return [(one.text(line), one.verdict.value, one.source) for one in found]


def test_the_command_that_asks_is_named_with_the_rule_that_made_it_ask() -> None:
    policy = _policy("Bash(git status)", asked=("Bash(git push:*)",))
    assert _judged(policy, "git status && rm -rf x; git push") == [
        ("git status", "allow", "Bash(git status)"),
        ("rm -rf x", "ask", "default"),
        ("git push", "ask", "Bash(git push:*)"),
    ]
    assert _judged(policy, "echo $(git push)") == [
        ("echo $(git push)", "ask", "Bash(git push:*)"),
        ("git push", "ask", "Bash(git push:*)"),
    ]
    assert _judged(policy, "git status") == []
    assert _judged(policy, "echo 'not understood") == []


def test_places_are_in_characters_and_not_in_bytes() -> None:
    assert [one[0] for one in _judged(_policy(), "echo äöü; echo €; rm x")] == ["echo äöü", "echo €", "rm x"]


def test_where_only_the_whole_line_asks_no_command_is_shown_as_allowed() -> None:
    policy = _policy("Bash(make)", "Bash(sort)")
    assert {one[1] for one in _judged(policy, "make & sort")} == {"ask"}


def test_of_a_very_long_line_only_what_asks_is_listed() -> None:
    policy = _policy("Bash(true)")
    found = _judged(policy, "true; " * 80 + "rm x")
    assert found == [("rm x", "ask", "default")]
    assert len(_judged(policy, "; ".join(f"rm {i}" for i in range(80)))) == MOST


# -- what is remembered


def test_remembering_grants_the_one_command_that_asked_as_it_was_offered() -> None:
    policy, given = _policy("Bash(git status)"), {"command": "git status && rm -rf x 2>&1"}

    def judge(command: str) -> Evaluation:
        return BUILT_IN.evaluate(policy, "Bash", {"command": command}, WORKSPACE)

    judged = judged_segments(given["command"], [judge(given["command"])], judge)
    assert asking(judged, given["command"]) == ["rm -rf x"]
    offered = [str(offer.rule) for offer in offers("Bash", given, WORKSPACE, judged)]
    assert offered[:2] == ["Bash(rm -rf x)", "Bash(rm:*)"]
    rule = granted("Bash", given, WORKSPACE, judged)
    assert str(rule) == offered[0]
    again = BUILT_IN.evaluate(policy, "Bash", given, WORKSPACE, remembered=[rule])
    assert again.verdict is Verdict.allow
    other = {"command": "git status && rm -rf y"}
    assert BUILT_IN.evaluate(policy, "Bash", other, WORKSPACE, remembered=[rule]).verdict is Verdict.ask
    with pytest.raises(InvalidInput):  # it did not ask
        check_granted(Rule(rule="Bash(git status)", policy="always_allow"), "Bash", given, WORKSPACE, judged)


def test_where_several_commands_ask_or_the_line_is_not_sure_exactly_the_line_is_remembered() -> None:
    def judge(_: str) -> Evaluation:
        return Evaluation(Verdict.ask, "default")

    for line in ("rm x; rm y", "cd z && rm x", "rm $(cat x)"):
        judged = judged_segments(line, [judge(line)], judge)
        rule = granted("Bash", {"command": line}, WORKSPACE, judged)
        assert rule.digest is not None, line
        assert rule in [offer.rule for offer in offers("Bash", {"command": line}, WORKSPACE, judged)]


# -- against a shell

PROGRAMS = ("a", "b", "c", "cat", "'d'", '"b"')
ARGUMENTS = ("-x", "'x y'", "2>&1", ">/dev/null", "2> /dev/null", "a")
JOINTS = ("&&", "||", ";", "|", "\n")
ODD = (
    *(
        "cd",
        "set",
        "if",
        "then",
        "fi",
        "{",
        "}",
        "!",
        "&",
        "|&",
        ";;",
        "<f",
        ">f",
        "#",
        "$x",
        "$(c)",
        "eval",
        "'",
    ),
    *("\\", "time", "exec", "x=1", "&>/dev/null", "<<x", "`c`", "(", ")", "*", "-"),
)
STUB = '#!/bin/sh\necho "${0##*/}|$*" >>"$LOG"\n'


def _random_line(chance: random.Random) -> str:
    words: list[str] = []
    for _ in range(chance.randint(2, 4)):
        words += [
            chance.choice(PROGRAMS),
            *chance.choices(ARGUMENTS, k=chance.randint(0, 2)),
            chance.choice(JOINTS),
        ]
    for _ in range(chance.choice((0, 0, 1, 2))):
        words.insert(chance.randint(0, len(words)), chance.choice(ODD))
    return " ".join(words[: -chance.randint(0, 1) or None])


def test_a_shell_runs_nothing_but_the_parts_of_a_line(tmp_path: Path) -> None:
    """Random lines over words that matter to a shell: what it runs is among the parts that were judged."""
    stubs, chance = tmp_path / "bin", random.Random("lines")
    stubs.mkdir()
    for name in ("a", "b", "c", "d", "cat"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    lines = {_random_line(chance) for _ in range(1_200)}
    taken = [(line, found) for line in sorted(lines) if (found := parts(line))]
    assert len(taken) > 50
    for number, (line, found) in enumerate(chance.sample(taken, 40)):
        log = tmp_path / str(number)
        environment = {"PATH": str(stubs), "LOG": str(log)}
        done = subprocess.run(
            ["/bin/bash", "--norc", "--noprofile", "-c", line],
            env=environment,
            cwd=stubs,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        assert b"syntax error" not in done.stderr, line
        ran = log.read_text().splitlines() if log.exists() else []
        judged = {
            f"{words[0]}|{' '.join(words[1:])}" for words in (shlex.split(one.command) for one in found)
        }
        assert set(ran) <= judged, (line, ran)
