"""Builds the views of events, with one function per type of event."""

from collections.abc import Callable, Mapping
from typing import Any

from claude_hitl_template.domain import missing_dependency
from claude_hitl_template.presentation.text import plain, progress_text, rule_text, texts, without_hook
from claude_hitl_template.presentation.tools import tool_view
from claude_hitl_template.presentation.views import (
    PERMISSION_TEXT,
    Call,
    Decision,
    EventView,
    Message,
    Notice,
    Result,
    Thinking,
    Tone,
)

type WireEvent = Mapping[str, Any]


def event_view(event: WireEvent) -> EventView | None:
    """Returns the view of an event in wire format; None for an event with nothing for a reader."""
    make = _VIEWS.get(event["type"])
    return make(event) if make else None


def _user_message(event: WireEvent) -> EventView:
    return Message("user", texts(event["content"]))


def _agent_message(event: WireEvent) -> EventView:
    return Message("agent", texts(event["content"]))


def _thinking(event: WireEvent) -> EventView:
    return Thinking(texts(event.get("content") or ()))


def _tool_use(event: WireEvent) -> EventView:
    given = event["input"]
    if missing_dependency.is_report(event):
        return Notice(missing_dependency.advice(given), "action", given["why"].strip())
    server, name = event.get("mcp_server_name"), str(event["name"])
    permission = event.get("evaluated_permission")
    return Call(
        tool_view(f"mcp__{server}__{name}" if server else name, given),
        permission if permission in PERMISSION_TEXT else None,
        bool(event.get("session_thread_id")),
    )


def _tool_result(event: WireEvent) -> EventView:
    said, failed = texts(event.get("content") or ()).rstrip("\n"), bool(event.get("is_error"))
    return Result(without_hook(said) if failed else said, failed, event.get("outcome") == "unknown")


def _confirmation(event: WireEvent) -> EventView:
    by = str(event.get("decided_by") or "")
    if event["result"] == "deny":
        return Decision(allowed=False, by=by, reason=str(event.get("deny_message") or ""))
    changed, rule = event.get("updated_input") or {}, event.get("remember")
    answers = changed.get("answers")
    if isinstance(answers, dict):
        answers, changed = {str(asked): plain(answer) for asked, answer in answers.items()}, {}
    else:
        answers = None
    remembered = rule_text(rule) if rule else ""
    return Decision(allowed=True, by=by, answers=answers, edited_input=changed or None, rule=remembered)


def _vote(event: WireEvent) -> EventView:
    by = ", ".join(event["allowed_by"])
    missing = "; ".join(event["missing"])
    return Notice(
        f"{event['by']} allows the call: {len(event['allowed_by'])} so far ({by})",
        "action",
        f"it takes {missing}",
    )


def _claimed(event: WireEvent) -> EventView:
    if event["until"] is None:
        return Notice(f"{event['by']} no longer looks at the call", "info")
    return Notice(f"{event['by']} is looking at the call until {event['until']}", "info")


def _delegated(event: WireEvent) -> EventView:
    return Notice(f"{event['by']} handed the call over to {event['to']['name']}", "action", event["note"])


def _escalated(event: WireEvent) -> EventView:
    to = event["to"] or {"roles": [], "groups": []}
    names = ", ".join([*to["roles"], *to["groups"]])
    return Notice(
        f"There was no decision in time: {names} may decide as well",
        "action",
        f"asked for by {event['rule']}",
    )


def _error(event: WireEvent) -> EventView:
    error = event["error"]
    message = str(error["message"])
    if error.get("concerns") == "workspace":
        return Notice(message, "error")
    if (error.get("retry_status") or {}).get("type") == "retrying":
        return Notice(f"trying again: {message}", "warning")
    return Notice(f"error: {message}", "error")


def _updated(event: WireEvent) -> EventView | None:
    progress = event.get("workspace")
    return Notice(progress_text(progress), "info") if progress else None


def waiting_text(count: int) -> str:
    """That so many calls wait for a decision."""
    return f"Waiting for you: {'one call waits' if count == 1 else f'{count} calls wait'} for a decision"


def _idle(event: WireEvent) -> EventView | None:
    reason = event.get("stop_reason") or {}
    match reason.get("type"):
        case "requires_action":
            return Notice(waiting_text(len(reason.get("event_ids") or ())), "strong")
        case "retries_exhausted":
            return Notice("The turn was given up after several tries. The session stays usable.", "error")
        case _:
            return None


def _notice(text: str, tone: Tone) -> Callable[[WireEvent], EventView]:
    return lambda _: Notice(text, tone)


_VIEWS: Mapping[str, Callable[[WireEvent], EventView | None]] = {
    "user.message": _user_message,
    "user.tool_confirmation": _confirmation,
    "approval.vote": _vote,
    "approval.claimed": _claimed,
    "approval.delegated": _delegated,
    "approval.escalated": _escalated,
    "user.interrupt": _notice("The turn was interrupted; what waited is superseded.", "strong"),
    "agent.message": _agent_message,
    "agent.thinking": _thinking,
    "agent.tool_use": _tool_use,
    "agent.mcp_tool_use": _tool_use,
    "agent.tool_result": _tool_result,
    "agent.mcp_tool_result": _tool_result,
    "session.error": _error,
    "session.updated": _updated,
    "session.status_idle": _idle,
    "session.status_rescheduled": _notice(
        "The session's process ended unexpectedly; it is started again.", "warning"
    ),
    "session.status_terminated": _notice("The session has ended.", "strong"),
    "session.deleted": _notice("The session was deleted.", "strong"),
}
