"""Builds the views of tool calls, with one function per tool.

To show another tool, add a function and register it under the tool's full name (`NotebookEdit`, `mcp__server__tool`):
the terminal and the panel then show it. A function removes the fields that it shows in a special form from its copy of
the input. The remaining fields are shown after them as they are, so that no field of an input is ever left out.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from claude_hitl_template.domain.canonical_json import shown_host
from claude_hitl_template.domain.policy import mcp_parts
from claude_hitl_template.presentation.text import (
    are_strings,
    asked_questions,
    is_host,
    option_description,
    option_label,
    plain,
    question_options,
    summary,
)
from claude_hitl_template.presentation.views import (
    Caution,
    Code,
    Diff,
    Field,
    Fields,
    Option,
    Part,
    Prose,
    Question,
    Table,
    ToolView,
)

type Input = dict[str, Any]
type Parts = Callable[[Input], list[Part] | None]
_PARTS: dict[str, Parts] = {}


def tool_view(name: str, given: Mapping[str, Any]) -> ToolView:
    """The view of one call.

    Args:
        name: The tool's full name.
        given: The call's input, of any shape: one that does not fit the tool is shown as JSON.
    """
    server, tool = mcp_parts(name)
    make = _PARTS.get(name) or (_mcp(server, tool) if server else None)
    rest = dict(given)
    parts = make(rest) if make else None
    if parts is None:
        parts, rest = [Code("input", pretty_json(given))], {}
    remaining = tuple(Field(key, plain(value)) for key, value in rest.items())
    whole = (*parts, Fields(remaining)) if remaining else tuple(parts)
    return ToolView(name, f"{server}: {tool}" if server else name, summary(given), whole)


def pretty_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


def _shows(name: str) -> Callable[[Parts], Parts]:
    """Registers a function that removes the fields it shows from the input, or returns None if the input does not fit."""

    def register(make: Parts) -> Parts:
        _PARTS[name] = make
        return make

    return register


def _taken(rest: Input, *names: str) -> list[Part]:
    """Removes the fields with these names that are texts from the input, and returns them."""
    found = tuple(Field(name, rest.pop(name)) for name in names if isinstance(rest.get(name), str))
    return [Fields(found)] if found else []


@_shows("Bash")
def _bash(rest: Input) -> list[Part] | None:
    if not are_strings(rest, "command"):
        return None
    return [*_taken(rest, "description"), Code("command", rest.pop("command"))]


@_shows("Write")
def _write(rest: Input) -> list[Part] | None:
    if not are_strings(rest, "file_path", "content"):
        return None
    return [Fields((Field("file", rest.pop("file_path")),)), Code("content", rest.pop("content"))]


@_shows("Edit")
def _edit(rest: Input) -> list[Part] | None:
    if not are_strings(rest, "file_path", "old_string", "new_string"):
        return None
    file = Field("file", rest.pop("file_path"))
    return [Fields((file,)), Diff("change", rest.pop("old_string"), rest.pop("new_string"))]


@_shows("NotebookEdit")
def _notebook_edit(rest: Input) -> list[Part] | None:
    if not are_strings(rest, "notebook_path", "new_source"):
        return None
    fields = [Field("notebook", rest.pop("notebook_path"))]
    mode, type_ = rest.get("edit_mode", "replace"), rest.get("cell_type", "")
    if mode in ("replace", "insert", "delete"):
        rest.pop("edit_mode", None)
        fields.append(Field("action", f"{mode} cell", strong=True))
    if are_strings(rest, "cell_id"):
        fields.append(Field("after cell" if mode == "insert" else "cell", rest.pop("cell_id")))
    if type_ in ("code", "markdown"):
        fields.append(Field("cell type", rest.pop("cell_type")))
    parts: list[Part] = [Fields(tuple(fields))]
    if mode == "delete":
        parts.append(Caution("The cell is deleted with its content."))
    source = rest.pop("new_source")
    return [*parts, Code("new source", source)] if source or mode != "delete" else parts


@_shows("Network")
def _network(rest: Input) -> list[Part] | None:
    if not is_host(rest):
        return None
    host = Field("wants to reach", shown_host(rest.pop("host"), rest.pop("port")), strong=True)
    parts: list[Part] = [Fields((host,))]
    if are_strings(rest, "because"):
        parts.append(Code("because of", rest.pop("because")))
    return parts


@_shows("AskUserQuestion")
def _ask_user_question(rest: Input) -> list[Part] | None:
    if not isinstance(rest.get("questions"), list):
        return None
    known = [str(question.get("question", "")) for question in asked_questions(rest)]
    given = rest.get("answers")
    answers: Mapping[str, Any] = {}
    if isinstance(given, dict) and set(given) <= set(known):
        answers = rest.pop("answers")
    return [_question(question, answers) for question in rest.pop("questions")]


def _question(asked: Any, answers: Mapping[str, Any]) -> Part:
    if not isinstance(asked, dict):
        return Fields((Field("question", plain(asked)),))
    text = str(asked.get("question", ""))
    options = (Option(option_label(o), option_description(o)) for o in question_options(asked))
    answer = answers.get(text)
    return Question(text, bool(asked.get("multiSelect")), tuple(options), plain(answer) if answer else "")


@_shows("ExitPlanMode")
def _exit_plan_mode(rest: Input) -> list[Part] | None:
    return [Prose("plan", rest.pop("plan"))] if are_strings(rest, "plan") else None


# -- tools of MCP servers

_JSON_TYPES: Mapping[type, str] = {
    str: "text",
    bool: "boolean",
    int: "number",
    float: "number",
    list: "list",
    dict: "object",
    type(None): "null",
}


def _mcp(server: str, tool: str) -> Parts:
    """The view of a tool that has no function here: its arguments with their types, because `5` and `"5"` differ."""

    def parts(rest: Input) -> list[Part]:
        head = Fields((Field("server", server), Field("tool", tool)))
        rows = tuple((name, _JSON_TYPES.get(type(value), ""), _cell(value)) for name, value in rest.items())
        rest.clear()
        arguments = Table("arguments", ("name", "type", "value"), rows) if rows else None
        return [head, arguments or Fields((Field("arguments", "none"),))]

    return parts


def _cell(value: Any) -> str:
    return pretty_json(value) if isinstance(value, (list, dict)) else plain(value)
