"""State of the turn that a session's owner works on, and the events made from it."""

import math
import time
import uuid
from dataclasses import dataclass, field

from claude_hitl_template.domain import events
from claude_hitl_template.domain.events import Draft
from claude_hitl_template.session.engine import RequestEnd, ToolResult, ToolUse

FLUSH_S = 0.02  # drafts are committed together if they arrive within this time of the first
CLI_REJECTED = "The user doesn't want to proceed with this tool use."


@dataclass
class Turn:
    """What the engine reported in this turn and is not committed yet.

    `batch` holds tool uses that are not registered with the store; `early_results` the results that arrived for
    them; `names` tool names by call id; `postponed` the calls that are registered only when the CLI asks for them.
    """

    drafts: list[Draft] = field(default_factory=list[Draft])
    drafted_at: float | None = None
    batch: list[ToolUse] = field(default_factory=list[ToolUse])
    early_results: list[ToolResult] = field(default_factory=list[ToolResult])
    names: dict[str, str] = field(default_factory=dict[str, str])
    postponed: dict[str, ToolUse] = field(default_factory=dict[str, ToolUse])
    interrupted: bool = False
    stuck: bool = False  # the interrupt did not reach the engine

    def take_drafts(self) -> list[Draft]:
        drafts, self.drafts, self.drafted_at = self.drafts, [], None
        return drafts

    def hurry(self) -> None:
        """The drafts are due: nothing that belongs to them follows."""
        self.drafted_at = -math.inf

    def until_flush_s(self) -> float:
        """Seconds until the drafts are due. The end of an answer comes in three messages: they are committed together."""
        now = time.monotonic()
        self.drafted_at = self.drafted_at or now
        return max(self.drafted_at + FLUSH_S - now, 0)


def message_uuid(event_id: str) -> str:
    """The transcript's UUID of a user message, derived from its event id: a repeated message is recognised by it."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"claude-hitl:{event_id}"))


def request_start(message_id: str) -> Draft:
    return events.draft("span.model_request_start", f"sevt_{message_id}_start")


def request_end(event: RequestEnd) -> Draft:
    return events.draft(
        "span.model_request_end",
        f"sevt_{event.message_id}_end",
        model_request_start_id=f"sevt_{event.message_id}_start",
        model_usage=event.usage,
        is_error=False,
    )


def result_draft(event_id: str, result: ToolResult, *, mcp: bool, cut_short: bool) -> Draft:
    """The event of a tool's result.

    Args:
        event_id: of the tool use that the result belongs to.
        result: as the CLI reported it.
        mcp: whether the tool is an MCP server's.
        cut_short: the call was interrupted after it had begun, and the CLI reports it as rejected: its outcome is
            unknown.
    """
    if not cut_short:
        return events.tool_result(event_id, result.content, result.is_error, mcp=mcp)
    rest = [b for b in result.content if not str(b.get("text", "")).startswith(CLI_REJECTED)]
    content = [*events.text_blocks(events.CUT_SHORT), *rest]
    return events.tool_result(event_id, content, True, mcp=mcp, outcome="unknown")
