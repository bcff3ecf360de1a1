"""A person's input becomes exactly the intended decision, and anything else becomes none."""

from typing import Any

import pytest
from rich.console import Console, RenderableType

from claude_hitl_template.cli.terminal.dialogue import ask_about, choose, scripted
from claude_hitl_template.domain.policy.tiers import Requirement
from claude_hitl_template.errors import InvalidInput

QUESTIONS = [
    {"question": "Colour?", "multiSelect": False, "options": [{"label": "Blue"}, {"label": "Green"}]},
    {
        "question": "Formats?",
        "multiSelect": True,
        "options": [{"label": "A"}, {"label": "B"}, {"label": "C"}],
    },
]


class Typist:
    """A person who types these lines and then leaves; in the editor, the person replaces the input by each of
    `edits` in turn."""

    def __init__(self, *lines: str, edits: tuple[str | None, ...] = ()) -> None:
        self.lines, self.edits = list(lines), list(edits)
        self.console = Console(record=True, width=100, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115

    def show(self, what: RenderableType) -> None:
        self.console.print(what, markup=False)

    def ask(self, prompt: str) -> str:
        del prompt
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)

    def edit(self, text: str) -> str | None:
        del text
        return self.edits.pop(0)


def approval(kind: str = "tool", **given: Any) -> dict[str, Any]:
    name = {"tool": "Bash", "question": "AskUserQuestion", "plan": "ExitPlanMode", "network": "Network"}[kind]
    inputs = {
        "tool": {"command": "ls"},
        "question": {"questions": QUESTIONS},
        "plan": {"plan": "# P"},
        "network": {"host": "files.example.org", "port": 443, "because": "curl"},
    }
    shown = given or inputs[kind]
    return {"id": "appr_1", "kind": kind, "tool_name": name, "cwd": "/w", "input": shown, "agent_id": None}


def decided(*lines: str, kind: str = "tool", edits: tuple[str | None, ...] = ()) -> dict[str, Any]:
    prompter = Typist(*lines, edits=edits)
    with prompter.console.file:
        body = ask_about(prompter, approval(kind))
    assert not prompter.lines
    return body


@pytest.mark.parametrize("word", ["a", "allow", "ALLOW", " y "])
def test_allow(word: str) -> None:
    assert decided(word) == {"result": "allow"}


@pytest.mark.parametrize("word", ["w", "always"])
def test_always_is_allow_and_remember(word: str) -> None:
    assert decided(word) == {"result": "allow", "remember": True}


def test_deny_with_its_reason_in_one_line_or_two_or_without() -> None:
    assert decided("deny too risky") == {"result": "deny", "deny_message": "too risky"}
    assert decided("d", "too risky") == {"result": "deny", "deny_message": "too risky"}
    assert decided("n", "") == {"result": "deny"}


@pytest.mark.parametrize("word", ["", "yes please", "allowed", "1", "/allow", "ja"])
def test_anything_else_decides_nothing_and_is_asked_again(word: str) -> None:
    assert decided(word, "d", "") == {"result": "deny"}


def test_leaving_decides_nothing() -> None:
    for kind in ("tool", "question", "plan"):
        with pytest.raises(EOFError):
            decided(kind=kind)


def test_an_edited_input_is_shown_again_before_it_is_allowed() -> None:
    prompter = Typist("e", "a", edits=('{"command": "ls -l"}',))
    with prompter.console.file:
        assert ask_about(prompter, approval()) == {"result": "allow", "updated_input": {"command": "ls -l"}}
        assert "│ ls -l" in prompter.console.export_text()


def test_an_input_left_as_it_was_is_no_edit() -> None:
    assert decided("e", "a", edits=(None,)) == {"result": "allow"}
    assert decided("e", "a", edits=('{"command": "ls"}',)) == {"result": "allow"}


@pytest.mark.parametrize("broken", ["{", "[]", '"x"', ""])
def test_an_edit_that_is_no_object_changes_nothing(broken: str) -> None:
    assert decided("e", "a", edits=(broken,)) == {"result": "allow"}


def test_a_second_edit_starts_from_the_first() -> None:
    body = decided("e", "e", "w", edits=('{"command": "b"}', None))
    assert body == {"result": "allow", "updated_input": {"command": "b"}, "remember": True}


def test_questions_are_answered_by_number_by_numbers_or_in_own_words() -> None:
    assert decided("2", "3, 1", kind="question")["answers"] == {"Colour?": "Green", "Formats?": ["C", "A"]}
    assert decided("mauve", "none of them", kind="question")["answers"] == {
        "Colour?": "mauve",
        "Formats?": "none of them",
    }


def test_a_question_is_asked_again_until_the_answer_stands_for_something() -> None:
    assert decided("", "7", "1 2", "1", "2", kind="question")["answers"] == {
        "Colour?": "Blue",
        "Formats?": ["B"],
    }


def test_a_question_can_be_declined() -> None:
    assert decided("1", "/deny not now", kind="question") == {"result": "deny", "deny_message": "not now"}


@pytest.mark.parametrize(
    ("line", "several", "meant"),
    [("1", False, "x"), ("1 1", True, ["x"]), ("1 2", False, None), ("0", True, None),
     ("", True, None), ("1 b", True, "1 b")],
)  # fmt: skip
def test_what_an_answer_stands_for(line: str, several: bool, meant: Any) -> None:
    assert choose(line, ["x", "y"], several=several) == meant


def test_a_plan_is_accepted_or_sent_back_with_comments() -> None:
    assert decided("accept", kind="plan") == {"result": "allow"}
    assert decided("b use blue", kind="plan") == {"result": "deny", "deny_message": "use blue"}
    assert decided("", "hm", "back", "smaller", kind="plan") == {"result": "deny", "deny_message": "smaller"}


def test_scripted_decisions() -> None:
    assert scripted(approval(), "allow", None) == {"result": "allow"}
    assert scripted(approval("question"), "allow", None)["answers"] == {"Colour?": "Blue", "Formats?": "A"}
    assert scripted(approval("question"), "deny", "no") == {"result": "deny", "deny_message": "no"}
    assert scripted(approval("plan"), "deny", None) == {"result": "deny"}


def test_a_question_without_options_is_not_answered_by_script() -> None:
    with pytest.raises(InvalidInput, match="nothing to choose"):
        scripted(approval("question", questions=[{"question": "Why?", "options": []}]), "allow", None)


@pytest.mark.parametrize(
    ("lines", "body"),
    [
        (["a"], {"result": "allow"}),
        (["w"], {"result": "allow", "remember": True}),
        (["d not ours"], {"result": "deny", "deny_message": "not ours"}),
        (["e", "?", "d", ""], {"result": "deny"}),
    ],
)
def test_a_host_is_allowed_for_now_for_the_session_or_denied(lines: list[str], body: dict[str, Any]) -> None:
    assert decided(*lines, kind="network") == body


def said_when(*lines: str, kind: str = "tool", edits: tuple[str | None, ...] = ()) -> str:
    """What the screen says to a user who types these lines."""
    prompter = Typist(*lines, edits=edits)
    with prompter.console.file:
        ask_about(prompter, approval(kind))
        return prompter.console.export_text()


def test_a_number_that_is_no_choice_and_an_empty_answer_are_answered() -> None:
    said = said_when("7", "1 2", "", "1", "2 9", "2", kind="question")
    for part in (
        "there is no 7; the choices are 1 to 2",
        "choose one; the choices are 1 to 2",
        "the question needs an answer",
        "there is no 9; the choices are 1 to 3",
    ):
        assert part in said


def test_an_edit_that_changes_nothing_is_said() -> None:
    assert "the input is unchanged" in said_when("e", "a", edits=(None,))
    assert "unchanged" not in said_when("e", "a", edits=('{"command": "pwd"}',))


LINE = "git status && rm -rf x"
SEGMENTS = [
    {"text": "git status", "start": 0, "end": 10, "verdict": "allow", "source": "Bash(git status)"},
    {"text": "rm -rf x", "start": 14, "end": 22, "verdict": "ask", "source": "default"},
]


def test_of_a_line_the_command_that_asked_is_shown_and_remembered() -> None:
    prompter = Typist("always 2")
    with prompter.console.file:
        body = ask_about(prompter, {**approval(command=LINE), "segments": SEGMENTS})
        said = prompter.console.export_text()
    assert body == {"result": "allow", "remember": "Bash(rm:*)"}
    assert "1. Bash(rm -rf x)  exactly this command, alone or in a line" in said


def test_a_call_that_the_workspace_asks_for_cannot_be_remembered() -> None:
    prompter = Typist("always", "allow")
    with prompter.console.file:
        body = ask_about(
            prompter, {**approval(), "requirements": [Requirement(rule="Bash").model_dump(mode="json")]}
        )
        said = prompter.console.export_text()
    assert body == {"result": "allow"}
    assert "cannot be remembered" in said
