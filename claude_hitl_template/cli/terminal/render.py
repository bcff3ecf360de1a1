"""Renders the views of calls and events for a terminal. Every text from outside goes through `shown`."""

from collections.abc import Mapping
from typing import Any, assert_never

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.table import Table as RichTable
from rich.text import Text

from claude_hitl_template.presentation.approvals import approval_parts
from claude_hitl_template.presentation.events import event_view
from claude_hitl_template.presentation.terminal import shown
from claude_hitl_template.presentation.text import diff_lines, leads_to
from claude_hitl_template.presentation.tools import tool_view
from claude_hitl_template.presentation.views import (
    PERMISSION_TEXT,
    Call,
    Caution,
    Code,
    Decision,
    Diff,
    EventView,
    Field,
    Fields,
    Message,
    Notice,
    Part,
    Prose,
    Question,
    Result,
    Table,
    Thinking,
    Tone,
)

RESULT_LINES = 12
_DIM = "dim"
_NAME = "bold"
_STRONG = "bold yellow"
# A terminal asks about waiting calls by itself, and an error event precedes a turn that is given up.
_HIDDEN = frozenset({"session.status_idle"})
_TONES: Mapping[Tone, str] = {
    "info": _DIM,
    "strong": "yellow",
    "warning": "yellow",
    "action": "yellow",
    "error": "red",
}

# -- events


def event_lines(event: Mapping[str, Any]) -> RenderableType | None:
    """One event of a session's log; None for an event that tells a reader nothing."""
    view = None if event["type"] in _HIDDEN else event_view(event)
    return None if view is None else _event(view)


def _event(view: EventView) -> RenderableType:
    match view:
        case Message():
            return _message(view)
        case Thinking():
            return Text("(thinking)", style=_DIM)
        case Call():
            return _call(view)
        case Result():
            return _result(view)
        case Decision():
            return _decision(view)
        case Notice():
            return _notice(view)
        case _:
            assert_never(view)


def _message(message: Message) -> Text:
    text = message.text.rstrip("\n")
    if message.author == "agent":
        return shown(text)
    return Text.assemble(("you  ", "bold"), shown(text, "bold cyan"))


def _call(call: Call) -> Text:
    permission = call.permission
    said = "" if permission in (None, "allow") else f" ({PERMISSION_TEXT[permission]})"
    indent = "  " if call.by_subagent else ""
    return Text.assemble(
        (f"{indent}● ", "blue"), shown(call.tool.title, "bold"), " ", call.tool.summary, (said, _DIM)
    )


def _result(result: Result) -> RenderableType:
    lines = result.text.split("\n")
    cut = len(lines) - RESULT_LINES
    body = shown("\n".join(lines[:RESULT_LINES]), "red" if result.failed else _DIM)
    if cut > 0:
        body.append(f"\n... {cut} more lines", style="dim italic")
    if result.outcome_unknown:
        body.append(
            "\noutcome unknown: this call may have taken effect; it is not repeated", style="bold red"
        )
    return _Behind(Segment("  "), body)


def _decision(decision: Decision) -> Text:
    by = shown(f" by {decision.by}" if decision.by else "", _DIM)
    if not decision.allowed:
        return Text.assemble(
            ("  denied", "red"), by, shown(f": {decision.reason}" if decision.reason else "")
        )
    changed = (
        " with answers" if decision.answers is not None else " as edited" if decision.edited_input else ""
    )
    rule = shown(f"; remembered: {decision.rule}" if decision.rule else "", _DIM)
    return Text.assemble((f"  allowed{changed}", "green"), by, rule)


def _notice(notice: Notice) -> Text:
    mark = ("! ", _STRONG) if notice.tone == "action" else ""
    detail = shown(f"\n  {notice.detail}" if notice.detail else "", _DIM)
    return Text.assemble(mark, shown(notice.text, _TONES[notice.tone]), detail)


# -- approvals


def approval_view(approval: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> RenderableType:
    """Exactly what would run: the tool, the folder and every field of the input.

    Args:
        approval: In wire format.
        given: The input to show instead of the proposed one.
    """
    asked_by = " (asked by a subagent)" if approval.get("agent_id") else ""
    head = [
        Text.assemble(("tool    ", _NAME), shown(str(approval["tool_name"])), (asked_by, _DIM)),
        Text.assemble(("folder  ", _NAME), shown(str(approval["cwd"]))),
    ]
    proposed = approval["input"] if given is None else given
    if elsewhere := leads_to(proposed, approval.get("targets")):
        head.append(Text.assemble(("leads to", _NAME), " ", shown(elsewhere, _STRONG)))
    parts = (*approval_parts(approval), *tool_view(str(approval["tool_name"]), proposed).parts)
    return Group(*head, *map(_part, parts))


def _part(part: Part) -> RenderableType:
    match part:
        case Fields():
            return Group(*(_field(field) for field in part.fields))
        case Code() | Prose():
            return _titled(part.title, _barred(shown(part.text)))
        case Diff():
            return _titled(part.title, _barred(diff(part.old, part.new)))
        case Question():
            return _question(part)
        case Table():
            return _titled(part.title, _barred(_table(part)))
        case Caution():
            return shown(f"! {part.text}", _STRONG)
        case _:
            assert_never(part)


def diff(old: str, new: str) -> Text:
    """Both texts whole, as a diff; lines are split at newlines only."""
    result = Text()
    for mark, line in diff_lines(old, new):
        style = {"+": "green", "-": "red"}.get(mark, "")
        if result:
            result.append("\n")
        result.append(f"{mark} ", style=style).append_text(shown(line, style))
    return result


def _question(question: Question) -> RenderableType:
    several = "  (several may be chosen)" if question.several else ""
    lines = [Text.assemble(("question  ", _NAME), shown(question.text), (several, _DIM))]
    for number, option in enumerate(question.options, start=1):
        described = shown(f"  {option.description}" if option.description else "", _DIM)
        lines.append(Text.assemble(f"  {number}. ", shown(option.label, "bold"), described))
    if question.answer:
        lines.append(Text.assemble(("answer  ", _NAME), shown(question.answer)))
    return Group(*lines)


def _table(table: Table) -> RenderableType:
    shape = RichTable(box=box.MINIMAL, show_edge=False, show_lines=True)
    for column in table.columns:
        shape.add_column(shown(column, _NAME), overflow="fold")
    for row in table.rows:
        shape.add_row(*(shown(cell) for cell in row))
    return shape


def _field(field: Field) -> RenderableType:
    line = Text.assemble(shown(f"{field.name}  ", _NAME), shown(field.value, _STRONG if field.strong else ""))
    return _barred(line) if "\n" in line.plain else line


def _titled(title: str, body: RenderableType) -> RenderableType:
    return Group(shown(title, _NAME), body)


class _Behind:
    """Puts every line behind a mark, wrapped lines too, so that text which imitates this program is not mistaken for it."""

    def __init__(self, mark: Segment, body: RenderableType) -> None:
        self._mark, self._body = mark, body

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        inner = options.update(width=max(options.max_width - self._mark.cell_length, 1), height=None)
        for line in console.render_lines(self._body, inner, pad=False):
            yield self._mark
            yield from line
            yield Segment.line()


def _barred(body: RenderableType) -> RenderableType:
    return _Behind(Segment("  │ ", Style(color="blue")), body)
