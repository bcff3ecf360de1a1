"""Calls and events have one view, which terminal and panel both show completely."""

import os
from collections.abc import Callable
from typing import Any, get_args

import pytest
from hypothesis import given
from rich.console import Console, RenderableType

from claude_hitl_template.cli.terminal.render import approval_view, event_lines
from claude_hitl_template.panel.timeline import event_html
from claude_hitl_template.presentation import views
from claude_hitl_template.presentation.events import event_view
from claude_hitl_template.presentation.tools import tool_view
from claude_hitl_template.presentation.views import Code, Field, Fields, Table
from tests.unit.panel.components import call_view
from tests.unit.panel.html import Reader
from tests.unit.panel.nasty import inputs, texts, tools


def printed(view: RenderableType | None) -> str:
    with open(os.devnull, "w") as nowhere:
        console = Console(width=100, record=True, file=nowhere)
        console.print(view)
        return console.export_text()


def in_terminal(tool: str, given_input: dict[str, Any]) -> str:
    return printed(approval_view({"tool_name": tool, "input": given_input, "cwd": "/w"}))


def in_panel(tool: str, given_input: dict[str, Any]) -> str:
    reader = Reader(call_view(tool, given_input))
    reader.check()
    return reader.text


both = pytest.mark.parametrize("seen", [in_terminal, in_panel], ids=["terminal", "panel"])
type Seen = Callable[[str, dict[str, Any]], str]
EXAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "fields": ("Write", {"file_path": "part.txt", "content": ""}),
    "code": ("Bash", {"command": "part"}),
    "diff": ("Edit", {"file_path": "f", "old_string": "a", "new_string": "part"}),
    "prose": ("ExitPlanMode", {"plan": "part"}),
    "question": ("AskUserQuestion", {"questions": [{"question": "part"}], "answers": {"part": "yes"}}),
    "table": ("mcp__a__b", {"x": "part"}),
    "caution": ("NotebookEdit", {"notebook_path": "part", "new_source": "", "edit_mode": "delete"}),
}


@both
@pytest.mark.parametrize("kind", [part.kind for part in get_args(views.Part.__value__)])
def test_every_part_of_a_call_is_shown_in_every_medium(kind: str, seen: Seen) -> None:
    tool, given_input = EXAMPLES[kind]
    assert kind in {part.kind for part in tool_view(tool, given_input).parts}
    assert "part" in seen(tool, given_input)


EVENTS: dict[str, dict[str, Any]] = {
    "message": {"type": "agent.message", "content": [{"type": "text", "text": "hello"}]},
    "thinking": {"type": "agent.thinking"},
    "call": {"type": "agent.tool_use", "name": "Bash", "input": {"command": "ls"}},
    "result": {"type": "agent.tool_result", "content": [{"type": "text", "text": "out"}]},
    "decision": {"type": "user.tool_confirmation", "result": "allow"},
    "notice": {"type": "session.error", "error": {"message": "bad"}},
}


@pytest.mark.parametrize("kind", [view.kind for view in get_args(views.EventView.__value__)])
def test_every_event_is_shown_in_every_medium(kind: str) -> None:
    event = EVENTS[kind]
    view = event_view(event)
    assert view is not None
    assert view.kind == kind
    assert event_html(event)
    assert event_lines(event) is not None


def test_an_unknown_event_has_no_view() -> None:
    assert event_view({"type": "new.kind"}) is None


@given(tools, inputs())
def test_no_field_of_an_input_is_left_out(tool: str, given_input: dict[str, Any]) -> None:
    shown = str(tool_view(tool, {**given_input, "extra": "surely shown"}).parts)
    assert "surely shown" in shown
    for name in ("command", "content", "plan", "new_string"):
        if isinstance(value := given_input.get(name), str) and value.isalnum():
            assert value in shown


@given(tools, texts)
def test_a_field_of_several_lines_does_not_pass_for_other_lines_of_the_terminal(tool: str, name: str) -> None:
    given_input = {"command": "ls", "description": "x\nfolder  /safe", f"{name}\ntool    Safe": 1}
    lines = in_terminal(tool, given_input).split("\n")
    assert not [line for line in lines[1:] if line.startswith(("tool    Safe", "folder  /safe"))]


# -- single tools


@both
def test_a_notebook_edit_shows_notebook_cell_action_and_source(seen: Seen) -> None:
    given_input = {
        "notebook_path": "/w/plot.ipynb",
        "cell_id": "c7",
        "cell_type": "code",
        "edit_mode": "insert",
        "new_source": "import os\nprint('<b>')",
        "odd": 1,
    }
    found = seen("NotebookEdit", given_input)
    for part in ("/w/plot.ipynb", "insert cell", "after cell", "c7", "print('<b>')", "odd"):
        assert part in found
    assert "deleted" not in found


@both
def test_the_deletion_of_a_notebook_cell_says_so(seen: Seen) -> None:
    found = seen("NotebookEdit", {"notebook_path": "n", "new_source": "", "edit_mode": "delete"})
    assert "delete cell" in found
    assert "The cell is deleted with its content." in found


def test_a_notebook_edit_without_a_mode_replaces_and_an_odd_mode_is_a_field() -> None:
    view = tool_view("NotebookEdit", {"notebook_path": "n", "new_source": "x"})
    assert view.parts == (
        Fields((Field("notebook", "n"), Field("action", "replace cell", strong=True))),
        Code("new source", "x"),
    )
    odd = tool_view("NotebookEdit", {"notebook_path": "n", "new_source": "x", "edit_mode": ["delete"]})
    assert Fields((Field("edit_mode", '["delete"]'),)) in odd.parts


@both
def test_an_mcp_call_shows_server_tool_and_each_argument_with_its_type(seen: Seen) -> None:
    given_input = {"title": "Fix it", "count": 5, "text": "5", "labels": ["a"], "done": None, "is_open": True}
    found = seen("mcp__tickets__create", given_input)
    for part in (
        "server",
        "tickets",
        "tool",
        "create",
        "title",
        "Fix it",
        "number",
        "list",
        "null",
        "boolean",
    ):
        assert part in found


def test_the_arguments_of_an_mcp_call_are_a_table() -> None:
    view = tool_view("mcp__tickets__create", {"count": 5, "text": "5", "labels": ["a"]})
    assert view.title == "tickets: create"
    assert view.parts[1] == Table(
        "arguments",
        ("name", "type", "value"),
        (("count", "number", "5"), ("text", "text", "5"), ("labels", "list", '[\n  "a"\n]')),
    )


def test_an_argument_of_several_lines_stays_in_its_column_of_the_terminal() -> None:
    found = in_terminal("mcp__a__b", {"text": "x\n  count  │ number │ 0", "count": 5})
    table = [line for line in found.split("\n") if line.startswith("  │  ")]
    assert [line.split("│")[1].strip() for line in table] == ["name", "text", "", "count"]


@both
@pytest.mark.parametrize("evil", ["<img src=x onerror=y>", "\x1b[2K\u202e"])
def test_hostile_arguments_of_an_mcp_call_are_text(evil: str, seen: Seen) -> None:
    found = seen("mcp__a__b", {evil: evil, "count": 5})
    assert not set("\x1b\u202e") & set(found)


@both
def test_answers_that_fit_no_question_are_still_shown(seen: Seen) -> None:
    given_input = {"questions": [{"question": "Which?"}], "answers": {"Other?": "surely shown"}}
    assert "surely shown" in seen("AskUserQuestion", given_input)
