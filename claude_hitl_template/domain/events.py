"""The wire protocol's events: builds those that the service emits and parses those that a client sends.

Shapes follow the Managed Agents protocol as the PyPI package `anthropic` types it (types/beta/sessions). Fields of
our own (`decided_by`, `updated_input`, `answers`, `remember`, `outcome`) are additions that its clients ignore.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from claude_hitl_template.domain.models import Approval, Usage, new_id
from claude_hitl_template.domain.policy import mcp_parts

MAX_TEXT_CHARS = 1_000_000
EVENT_TYPES = frozenset({
    "user.message", "user.interrupt", "user.tool_confirmation",
    "agent.message", "agent.thinking", "agent.tool_use", "agent.tool_result", "agent.mcp_tool_use", "agent.mcp_tool_result",
    "session.error", "session.status_running", "session.status_idle", "session.status_rescheduled",
    "session.status_terminated", "session.updated", "session.deleted", "session.usage",
    "span.model_request_start", "span.model_request_end",
    # Our own, about a call that waits for people: a vote of several, a claim, handing over by a person and by a deadline.
    "approval.vote", "approval.claimed", "approval.delegated", "approval.escalated",
})  # fmt: skip
# Types of the protocol that this service never emits. A client may filter by them all the same, and finds none.
FOREIGN_TYPES = frozenset({
    "user.custom_tool_result", "user.define_outcome", "user.tool_result", "system.message",
    "agent.custom_tool_use", "agent.thread_message_received", "agent.thread_message_sent", "agent.thread_context_compacted",
    "session.thread_created", "session.thread_status_running", "session.thread_status_idle",
    "session.thread_status_terminated", "session.thread_status_rescheduled",
    "span.outcome_evaluation_start", "span.outcome_evaluation_end", "span.outcome_evaluation_ongoing",
    "workflow_run.created", "workflow_run.status_running", "workflow_run.status_idle", "workflow_run.status_ended",
    "workflow_run.error", "workflow_run.phase_started", "workflow_run.phase_ended",
})  # fmt: skip


class Draft(BaseModel):
    """An event that is not committed yet. Committing the same id twice is committing it once."""

    model_config = ConfigDict(frozen=True)
    id: str
    type: str
    payload: dict[str, Any] = Field(default_factory=dict[str, Any])
    queued: bool = False  # True: processed_at stays empty until an owner takes the event up


def draft(type_: str, id_: str | None = None, *, queued: bool = False, **payload: Any) -> Draft:
    return Draft(id=id_ or new_id("sevt"), type=type_, payload=payload, queued=queued)


# Messages of the service to the model; the offline model recognises these texts

CONTINUE = (
    "The process that ran this session ended unexpectedly and was started again. Continue from where you left off. "
    "Calls whose outcome is unknown were not repeated: check what they did before you issue them again."
)
DECIDED = (
    "A human has decided on calls that were held. Issue each allowed call again, exactly as given, to run it."
)
CUT_SHORT = (
    "Outcome unknown: the call was interrupted while it ran. It may have taken effect in part or in full."
)
REFUSED = "These were refused, and must not be issued again:"
HOSTS_DECIDED = (
    "A human has decided on hosts that this session asked to reach. What was allowed can be reached until the end of this "
    "turn, or longer where it says so: repeat what needed it. What was refused must not be tried again in any way."
)

# What a client may send ------------------------------------------------------------------------------------------


class _Inbound(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class InboundText(_Inbound):
    type: Literal["text"]
    text: Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT_CHARS)]


def _is_base64(data: str) -> str:
    base64.b64decode(data, validate=True)  # its errors are ValueErrors, which pydantic reports
    return data


class InboundImageSource(_Inbound):
    type: Literal["base64"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    data: Annotated[str, StringConstraints(min_length=1), AfterValidator(_is_base64)]


class InboundImage(_Inbound):
    type: Literal["image"]
    source: InboundImageSource


class UserMessage(_Inbound):
    """`user.message`: queued and processed in order."""

    type: Literal["user.message"]
    content: Annotated[
        list[Annotated[InboundText | InboundImage, Field(discriminator="type")]],
        Field(min_length=1, max_length=100),
    ]


class UserInterrupt(_Inbound):
    """`user.interrupt`: stops the turn; what waits for a human is superseded."""

    type: Literal["user.interrupt"]
    session_thread_id: None = None


class UserToolConfirmation(_Inbound):
    """`user.tool_confirmation`: the only event that is a decision.

    Ours, beyond the protocol: `updated_input` (edit before allowing), `answers` (to a question, by question text;
    a list for several choices), `remember` (True for the narrowest standing rule, or a rule such as "Bash(npm test:*)").
    """

    type: Literal["user.tool_confirmation"]
    tool_use_id: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    result: Literal["allow", "deny"]
    deny_message: Annotated[str, StringConstraints(max_length=10_000)] | None = None
    updated_input: dict[str, Any] | None = None
    answers: dict[str, str | list[str]] | None = None
    remember: bool | str = False


ClientEvent = Annotated[UserMessage | UserInterrupt | UserToolConfirmation, Field(discriminator="type")]


# What the service emits ------------------------------------------------------------------------------------------


def text_blocks(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def agent_message(id_: str, text: str, thread: str | None = None) -> Draft:
    return draft("agent.message", id_, content=text_blocks(text), **_thread(thread))


def agent_thinking(id_: str, thread: str | None = None) -> Draft:
    return draft("agent.thinking", id_, **_thread(thread))


def tool_use(
    tool_use_id: str, name: str, given: Mapping[str, Any], verdict: str, thread: str | None
) -> Draft:
    """agent.tool_use, or agent.mcp_tool_use for a tool named mcp__server__tool. Its id is the call's tool_use_id."""
    body: dict[str, Any] = {"input": dict(given), **evaluated(verdict), **_thread(thread)}
    server, tool = mcp_parts(name)
    if server:
        return draft("agent.mcp_tool_use", tool_use_id, name=tool, mcp_server_name=server, **body)
    return draft("agent.tool_use", tool_use_id, name=name, **body)


def evaluated(verdict: str) -> dict[str, Any]:
    """The fields of a call's event that say how its policy judged it."""
    evaluation = {"allow": {"type": "always_allow"}, "ask": {"type": "always_ask"}}.get(verdict)
    return {"evaluated_permission": verdict, "evaluation": evaluation}


def tool_result(
    tool_use_id: str,
    content: Sequence[Mapping[str, Any]],
    is_error: bool,
    *,
    mcp: bool = False,
    outcome: str | None = None,
) -> Draft:
    """agent.tool_result of one call. `outcome` "unknown": whether the call took effect is not known."""
    extra: dict[str, Any] = {"outcome": outcome} if outcome else {}
    kind, field = (
        ("agent.mcp_tool_result", "mcp_tool_use_id") if mcp else ("agent.tool_result", "tool_use_id")
    )
    body: dict[str, Any] = {
        field: tool_use_id,
        "content": [dict(b) for b in content],
        "is_error": is_error,
        **extra,
    }
    return draft(kind, tool_result_id(tool_use_id), **body)


def tool_result_id(tool_use_id: str) -> str:
    return f"sevt_result_{tool_use_id}"


def session_error(message: str, kind: str = "unknown_error", retry: str = "exhausted", **more: str) -> Draft:
    """`retry` is retrying | exhausted | terminal, as the protocol's retry_status; `more`: further fields of this kind."""
    error = {"type": kind, "message": message, "retry_status": {"type": retry}, **more}
    return draft("session.error", error=error)


def server_down(name: str, url: str, why: str | None) -> Draft:
    """An MCP server that could not be connected to, and why if that is known."""
    message = (
        f"the MCP server {name!r} at {url} cannot be used: {why or 'check the address, and that the server runs'}. The "
        "session goes on without its tools, and tries again when its process restarts"
    )
    return session_error(message, "mcp_connection_failed_error", mcp_server_name=name)


def workspace_unsaved(message: str) -> Draft:
    """Something of the workspace could not be saved; the next save tries again. `concerns` is ours."""
    return session_error(message, retry="retrying", concerns="workspace")


def workspace_progress(doing: str, done_bytes: int, of_bytes: int) -> Draft:
    """Progress of saving or restoring a large workspace: our addition to an event about a changed session."""
    return draft("session.updated", workspace={"doing": doing, "bytes": done_bytes, "of_bytes": of_bytes})


def status_running() -> Draft:
    return draft("session.status_running")


def status_rescheduled() -> Draft:
    return draft("session.status_rescheduled")


def status_idle(stop_reason: Mapping[str, Any]) -> Draft:
    return draft("session.status_idle", stop_reason=dict(stop_reason), stop_details=None)


def requires_action(event_ids: Sequence[str]) -> dict[str, Any]:
    return {"type": "requires_action", "event_ids": list(event_ids)}


END_TURN: dict[str, Any] = {"type": "end_turn"}
RETRIES_EXHAUSTED: dict[str, Any] = {"type": "retries_exhausted"}


def usage_event(usage: Usage, active_seconds: float) -> Draft:
    return draft("session.usage", usage=usage_wire(usage, active_seconds))


def usage_wire(usage: Usage, active_seconds: float) -> dict[str, Any]:
    """The protocol's usage snapshot. list_cost.amount is in whole cents, as a string; cost_usd is the exact figure."""
    return {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cache_read_input_tokens": usage.cache_read_input_tokens,
        "cache_creation": {"ephemeral_5m_input_tokens": usage.cache_creation_input_tokens},
        "active_seconds": round(active_seconds, 3),
        "list_cost": {"amount": str(round(usage.cost_usd * 100)), "currency": "USD"},
        "cost_usd": round(usage.cost_usd, 6),
    }


def _thread(thread: str | None) -> dict[str, Any]:
    return {"session_thread_id": thread} if thread else {}


def reminder(allowed: Sequence[Approval], refused: Sequence[Approval]) -> str:
    """The message that reminds the model of decided held calls and hosts."""
    calls = [a for a in allowed if a.kind != "network"], [a for a in refused if a.kind != "network"]
    hosts = [a for a in (*allowed, *refused) if a.kind == "network"]
    parts = [_calls_decided(*calls)] if any(calls) else []
    return "\n".join([*parts, *([HOSTS_DECIDED, *map(_host_decided, hosts)] if hosts else [])])


def _host_decided(approval: Approval) -> str:
    decision = approval.decision
    body: dict[str, Any] = {"host": approval.input["host"], "port": approval.input["port"]}
    if decision is None or decision.result == "deny":
        body["refused"] = (decision and decision.deny_message) or "no reason was given"
    else:
        body["allowed"] = "from now on" if decision.remember else "until the end of this turn"
    return _unexpanded(body)


def _unexpanded(body: Mapping[str, Any]) -> str:
    """JSON in which the CLI expands nothing: `@` is escaped."""
    return json.dumps(body, ensure_ascii=False).replace("@", r"\u0040")


def _calls_decided(allowed: Sequence[Approval], refused: Sequence[Approval]) -> str:
    def line(approval: Approval, **more: str) -> str:
        return _unexpanded({"name": approval.tool_name, "input": approval.input, **more})

    refusals = [
        line(a, refused=(a.decision and a.decision.deny_message) or "no reason was given") for a in refused
    ]
    return "\n".join((
        DECIDED,
        *(map(line, allowed)),
        *([REFUSED, *refusals] if refusals else []),
    ))  # fmt: skip
