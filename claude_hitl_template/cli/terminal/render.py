"""What events and approvals look like in a terminal. Everything that came from outside goes through `shown`."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from claude_hitl_template.domain import missing_dependency
from claude_hitl_template.domain.canonical_json import shown_host
from claude_hitl_template.presentation.terminal import shown
from claude_hitl_template.presentation.text import (
    are_strings,
    diff_lines,
    is_host,
    leads_to,
    option_description,
    option_label,
    progress_text,
    rule_text,
    summary,
    texts,
)

RESULT_LINES = 12
_DIM = "dim"
_FIELD = "bold"

# -- events


def event_lines(event: Mapping[str, Any]) -> RenderableType | None:
    """One event of a session's log; None for those that say nothing to a reader."""
    view = _VIEWS.get(event["type"])
    return view(event) if view else None


def _message(event: Mapping[str, Any]) -> Text:
    return shown(texts(event["content"]).rstrip("\n"))


def _prompt(event: Mapping[str, Any]) -> Text:
    return Text.assemble(("you  ", "bold"), shown(texts(event["content"]).rstrip("\n"), "bold cyan"))


def _note(text: str, style: str) -> Callable[[Mapping[str, Any]], Text]:
    return lambda _: Text(text, style=style)


def _use(event: Mapping[str, Any]) -> Text:
    if missing_dependency.is_report(event):
        why = shown(f"\n  {event['input']['why'].strip()}", _DIM)
        return Text.assemble(
            ("! ", "bold yellow"), shown(missing_dependency.advice(event["input"]), "yellow"), why
        )
    waits = {"ask": " (asks first)", "deny": " (denied by a rule)"}
    name = str(event["name"])
    if server := event.get("mcp_server_name"):
        name = f"{server}: {name}"
    indent = "  " if event.get("session_thread_id") else ""
    return Text.assemble(
        (f"{indent}● ", "blue"),
        shown(name, "bold"),
        " ",
        summary(event["input"]),
        (waits.get(str(event.get("evaluated_permission")), ""), _DIM),
    )


def _result(event: Mapping[str, Any]) -> RenderableType:
    failed = bool(event.get("is_error"))
    lines = texts(event.get("content") or ()).rstrip("\n").split("\n")
    cut = len(lines) - RESULT_LINES
    body = shown("\n".join(lines[:RESULT_LINES]), "red" if failed else _DIM)
    if cut > 0:
        body.append(f"\n... {cut} more lines", style="dim italic")
    if event.get("outcome") == "unknown":
        body.append("\noutcome unknown: nobody can say whether this call took effect", style="bold red")
    return _Behind(Segment("  "), body)


def _confirmation(event: Mapping[str, Any]) -> Text:
    by = shown(f" by {event['decided_by']}" if event.get("decided_by") else "", _DIM)
    if event["result"] == "deny":
        reason = f": {event['deny_message']}" if event.get("deny_message") else ""
        return Text.assemble(("  denied", "red"), by, shown(reason))
    changed = event.get("updated_input") or {}
    edited = "" if not changed else " with answers" if "answers" in changed else " as edited"
    rule = event.get("remember")
    kept = shown(f"; remembered: {rule_text(rule)}" if rule else "", _DIM)
    return Text.assemble((f"  allowed{edited}", "green"), by, kept)


def _error(event: Mapping[str, Any]) -> Text:
    error = event["error"]
    if (error.get("retry_status") or {}).get("type") == "retrying":
        return shown(str(error["message"]), "yellow")
    return Text.assemble(("error: ", "bold red"), shown(str(error["message"]), "red"))


def _updated(event: Mapping[str, Any]) -> Text | None:
    far = event.get("workspace")
    return Text(progress_text(far), style=_DIM) if far else None


_VIEWS: Mapping[str, Callable[[Mapping[str, Any]], RenderableType | None]] = {
    "user.message": _prompt,
    "user.tool_confirmation": _confirmation,
    "user.interrupt": _note("interrupted: the turn ends, and what waits is superseded", "yellow"),
    "agent.message": _message,
    "agent.thinking": _note("(thinking)", _DIM),
    "agent.tool_use": _use,
    "agent.mcp_tool_use": _use,
    "agent.tool_result": _result,
    "agent.mcp_tool_result": _result,
    "session.error": _error,
    "session.updated": _updated,
    "session.status_rescheduled": _note(
        "the session's process ended unexpectedly; it is started again", "yellow"
    ),
    "session.status_terminated": _note("the session has ended", _DIM),
    "session.deleted": _note("the session was deleted", _DIM),
}

# -- approvals


def approval_view(approval: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> RenderableType:
    """Exactly what would run: the tool, the folder, every field of the input. `given` stands in for the proposed input."""
    asked_by = " (asked by a subagent)" if approval.get("agent_id") else ""
    head = [
        Text.assemble(("tool    ", _FIELD), shown(str(approval["tool_name"])), (asked_by, _DIM)),
        Text.assemble(("folder  ", _FIELD), shown(str(approval["cwd"]))),
    ]
    proposed = approval["input"] if given is None else given
    if elsewhere := leads_to(proposed, approval.get("targets")):
        head.append(Text.assemble(("leads to", _FIELD), " ", shown(elsewhere, "bold yellow")))
    body = input_view(str(approval["tool_name"]), proposed)
    return Group(*head, *body)


def input_view(tool: str, given: Mapping[str, Any]) -> list[RenderableType]:
    """Every field of a call's input, the telling ones in the form that suits them."""
    rest = dict(given)
    parts: list[RenderableType] = []
    match tool:
        case "Bash" if isinstance(given.get("command"), str):
            parts += [_titled("command", _barred(shown(rest.pop("command"), "bold")))]
        case "Write" if are_strings(given, "file_path", "content"):
            parts += [
                _field("file", rest.pop("file_path")),
                _titled("content", _barred(shown(rest.pop("content")))),
            ]
        case "Edit" if are_strings(given, "file_path", "old_string", "new_string"):
            parts += [_field("file", rest.pop("file_path"))]
            parts += [_titled("change", _barred(diff(rest.pop("old_string"), rest.pop("new_string"))))]
        case "Network" if is_host(given):
            where = shown_host(rest.pop("host"), rest.pop("port"))
            parts += [Text.assemble(shown("wants to reach  ", _FIELD), shown(where, "bold yellow"))]
            if isinstance(given.get("because"), str):
                parts += [_titled("because of", _barred(shown(rest.pop("because"))))]
        case "AskUserQuestion" if isinstance(given.get("questions"), list):
            parts += [_question(q) for q in rest.pop("questions")]
        case "ExitPlanMode" if isinstance(given.get("plan"), str):
            parts += [_titled("plan", _barred(shown(rest.pop("plan"))))]
        case _:
            return [_titled("input", _barred(shown(json.dumps(given, ensure_ascii=False, indent=2))))]
    return [*parts, *(_field(name, value) for name, value in rest.items())]


def diff(old: str, new: str) -> Text:
    """Both texts whole, as a diff; lines are split at newlines only."""
    result = Text()
    for mark, line in diff_lines(old, new):
        style = {"+": "green", "-": "red"}.get(mark, "")
        if result:
            result.append("\n")
        result.append(f"{mark} ", style=style).append_text(shown(line, style))
    return result


def _question(question: Any) -> RenderableType:
    if not isinstance(question, dict):
        return _field("question", question)
    several = "  (several may be chosen)" if question.get("multiSelect") else ""
    lines: list[RenderableType] = [
        Text.assemble(("question  ", _FIELD), shown(str(question.get("question", ""))), (several, _DIM))
    ]
    for number, option in enumerate(question.get("options") or (), start=1):
        label, more = option_label(option), option_description(option)
        described = shown(f"  {more}" if more else "", _DIM)
        lines.append(Text.assemble(f"  {number}. ", shown(label, "bold"), described))
    return Group(*lines)


def _field(name: str, value: Any) -> RenderableType:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return Text.assemble(shown(f"{name}  ", _FIELD), shown(text))


def _titled(title: str, body: RenderableType) -> RenderableType:
    return Group(Text(title, style=_FIELD), body)


class _Behind:
    """Each line behind a mark, wrapped ones too, so that text which imitates this program does not pass for it."""

    def __init__(self, mark: Segment, text: Text) -> None:
        self._mark, self._text = mark, text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        inner = options.update(width=max(options.max_width - self._mark.cell_length, 1), height=None)
        for line in console.render_lines(self._text, inner, pad=False):
            yield self._mark
            yield from line
            yield Segment.line()


def _barred(text: Text) -> RenderableType:
    return _Behind(Segment("  │ ", Style(color="blue")), text)


def table_lines(rows: Iterable[Sequence[str]], heads: Sequence[str]) -> list[str]:
    """Columns of text already made visible, for output that a pipe may read; the last column is not padded."""
    whole = [tuple(heads), *(tuple(row) for row in rows)]
    widths = [max(len(row[i]) for row in whole) for i in range(len(heads) - 1)]
    return ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in whole]
