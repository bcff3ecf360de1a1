"""Models of the events in responses, for the API document only: one for each type, told apart by `type`."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel


class _Event(BaseModel):
    """`processed_at` is null while a message is queued. Clients must expect fields that are not listed here."""

    model_config = ConfigDict(extra="allow")
    id: str
    processed_at: datetime | None


class ContentBlock(BaseModel):
    """A part of a message or a result. `text` is there where `type` is "text"."""

    model_config = ConfigDict(extra="allow")
    type: str
    text: str | None = None


class UserMessageEvent(_Event):
    """A message to the agent."""

    type: Literal["user.message"]
    content: list[ContentBlock]


class UserInterruptEvent(_Event):
    """The turn was to be stopped; what waited is superseded."""

    type: Literal["user.interrupt"]


class UserToolConfirmationEvent(_Event):
    """The decision on a call. `updated_input` is what runs instead of what the agent had asked for."""

    type: Literal["user.tool_confirmation"]
    tool_use_id: str
    result: Literal["allow", "deny"]
    deny_message: str | None
    decided_by: str
    updated_input: dict[str, Any] | None = None
    allowed_by: list[str] | None = None


class AgentMessageEvent(_Event):
    """What the agent says."""

    type: Literal["agent.message"]
    content: list[ContentBlock]


class AgentThinkingEvent(_Event):
    """The agent thinks. The event does not contain the thoughts."""

    type: Literal["agent.thinking"]


class _Call(_Event):
    """A call. It waits for a decision while its id is in the session's `stop_reason.event_ids`."""

    name: str
    input: dict[str, Any]
    evaluated_permission: Literal["allow", "ask", "deny"]


class AgentToolUseEvent(_Call):
    """A call of a tool. Its id is the `tool_use_id` of its decision."""

    type: Literal["agent.tool_use"]


class AgentMcpToolUseEvent(_Call):
    """A call of an MCP server's tool. Its id is the `tool_use_id` of its decision."""

    type: Literal["agent.mcp_tool_use"]
    mcp_server_name: str


class _Result(_Event):
    content: list[ContentBlock]
    is_error: bool
    outcome: Literal["unknown"] | None = None


class AgentToolResultEvent(_Result):
    """The result of a call. `outcome` "unknown": whether the call took effect is not known."""

    type: Literal["agent.tool_result"]
    tool_use_id: str


class AgentMcpToolResultEvent(_Result):
    """The result of a call of an MCP server's tool."""

    type: Literal["agent.mcp_tool_result"]
    mcp_tool_use_id: str


class SessionErrorBody(BaseModel):
    """What went wrong in a turn, and how to fix it."""

    model_config = ConfigDict(extra="allow")
    type: str
    message: str


class SessionErrorEvent(_Event):
    """A turn, or a part of it, failed."""

    type: Literal["session.error"]
    error: SessionErrorBody


class SessionStatusRunningEvent(_Event):
    """The session works."""

    type: Literal["session.status_running"]


class StopReason(BaseModel):
    """Why a session is idle. `event_ids` is there where `type` is "requires_action": the calls that wait."""

    model_config = ConfigDict(extra="allow")
    type: Literal["end_turn", "requires_action", "retries_exhausted"]
    event_ids: list[str] | None = None


class SessionStatusIdleEvent(_Event):
    """The session rests, or waits for decisions."""

    type: Literal["session.status_idle"]
    stop_reason: StopReason


class SessionStatusRescheduledEvent(_Event):
    """The session's process ended unexpectedly, and is started again."""

    type: Literal["session.status_rescheduled"]


class SessionStatusTerminatedEvent(_Event):
    """The session is archived."""

    type: Literal["session.status_terminated"]


class SessionUpdatedEvent(_Event):
    """The session's title or metadata changed, or its workspace is being saved or restored."""

    type: Literal["session.updated"]


class SessionDeletedEvent(_Event):
    """The session was deleted; the stream ends. Not part of a listing."""

    type: Literal["session.deleted"]


class SessionUsageEvent(_Event):
    """What the session has used so far."""

    type: Literal["session.usage"]
    usage: dict[str, Any]


class ModelRequestStartEvent(_Event):
    """A request to the model begins."""

    type: Literal["span.model_request_start"]


class ModelRequestEndEvent(_Event):
    """A request to the model ended."""

    type: Literal["span.model_request_end"]
    model_request_start_id: str


class _Approval(_Event):
    approval_id: str
    tool_use_id: str


class ApprovalVoteEvent(_Approval):
    """One of several people who must agree has allowed a call."""

    type: Literal["approval.vote"]
    by: str
    allowed_by: list[str]
    missing: list[str]


class ApprovalClaimedEvent(_Approval):
    """Someone is looking at a call until then; null: no longer."""

    type: Literal["approval.claimed"]
    by: str
    until: datetime | None


class ApprovalDelegatedEvent(_Approval):
    """Someone handed a call over."""

    type: Literal["approval.delegated"]
    by: str
    to: dict[str, Any]
    note: str


class ApprovalEscalatedEvent(_Approval):
    """There was no decision by the deadline, so others may decide as well."""

    type: Literal["approval.escalated"]
    to: dict[str, Any] | None
    rule: str


class Event(
    RootModel[
        Annotated[
            UserMessageEvent
            | UserInterruptEvent
            | UserToolConfirmationEvent
            | AgentMessageEvent
            | AgentThinkingEvent
            | AgentToolUseEvent
            | AgentMcpToolUseEvent
            | AgentToolResultEvent
            | AgentMcpToolResultEvent
            | SessionErrorEvent
            | SessionStatusRunningEvent
            | SessionStatusIdleEvent
            | SessionStatusRescheduledEvent
            | SessionStatusTerminatedEvent
            | SessionUpdatedEvent
            | SessionDeletedEvent
            | SessionUsageEvent
            | ModelRequestStartEvent
            | ModelRequestEndEvent
            | ApprovalVoteEvent
            | ApprovalClaimedEvent
            | ApprovalDelegatedEvent
            | ApprovalEscalatedEvent,
            Field(discriminator="type"),
        ]
    ]
):
    """A committed event of a session; its other fields depend on its type."""
