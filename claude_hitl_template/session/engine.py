"""The Engine protocol: a session starts Claude through it, sends messages and receives events. Independent of the SDK.

`claude.cli_engine` implements it with the real CLI.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from claude_hitl_template.domain.models import Usage


@dataclass(frozen=True)
class RequestStart:
    """The model is being asked. `message_id` names the answer to come, and no other."""

    message_id: str


@dataclass(frozen=True)
class RequestEnd:
    """The answer is complete: no more calls of this message will follow. `usage` as the Messages API reports it."""

    message_id: str
    usage: dict[str, int]


@dataclass(frozen=True)
class Preview:
    """A piece of text of the event `event_id`, which will be committed later. `text` None opens the preview."""

    event_id: str
    type: str
    text: str | None


@dataclass(frozen=True)
class Text:
    event_id: str
    text: str
    thread: str | None = None


@dataclass(frozen=True)
class Thinking:
    event_id: str
    thread: str | None = None


@dataclass(frozen=True)
class Moment:
    """The CLI's state when it asks for a call: its folder, its mode, and its folder for drafts of plans."""

    cwd: str
    plan_mode: bool = False
    plans: Path | None = None


@dataclass(frozen=True)
class ToolUse:
    """A call the model issued. `thread` is the tool_use_id of the subagent's spawning call, None for the main one.

    `input` is unchecked: the model may send something other than an object. `moment` comes with the CLI's question.
    An engine knows a call by the id that the model's server gave it; the session gives it a `call_id` of its own, and
    keeps the server's as `model_id`. See session/calls.py.
    """

    call_id: str
    name: str
    input: dict[str, Any]
    thread: str | None = None
    moment: "Moment | None" = None
    model_id: str = ""

    def with_input(self, given: dict[str, Any]) -> "ToolUse":
        return replace(self, input=given)


@dataclass(frozen=True)
class ToolResult:
    """Content blocks in the wire protocol's shape; `call_id` and `thread` as in ToolUse."""

    call_id: str
    content: list[dict[str, Any]]
    is_error: bool
    thread: str | None = None


@dataclass(frozen=True)
class Retrying:
    """The model failed and is asked again by the CLI itself."""

    kind: str
    message: str


@dataclass(frozen=True)
class ServerDown:
    """The CLI could not connect to this MCP server: the turn goes on without its tools. `why` is None if it is not known."""

    name: str
    why: str | None = None


@dataclass(frozen=True)
class Conversation:
    """The conversation was cleared: this is the transcript to resume from now on."""

    transcript_id: str


@dataclass(frozen=True)
class TurnEnd:
    """The CLI waits for the next message. At most one of `deferred`, `interrupted` and `error` is set."""

    usage: Usage = field(default_factory=Usage)
    deferred: str | None = None
    interrupted: bool = False
    error: tuple[str, str] | None = None  # (kind, message)


type EngineEvent = (
    RequestStart
    | RequestEnd
    | Preview
    | Text
    | Thinking
    | ToolUse
    | ToolResult
    | Retrying
    | ServerDown
    | Conversation
    | TurnEnd
)


class Engine(Protocol):
    async def start(self, *, resume: bool, plan_mode: bool) -> None:
        """Raises EngineError with the fix in its message. With `resume`, a deferred call is asked for again."""
        ...

    async def say(self, message_uuid: str, content: list[dict[str, Any]]) -> None:
        """Sends a message, which begins a turn. One whose UUID the transcript has already is ignored."""
        ...

    def events(self) -> AsyncIterator[EngineEvent]:
        """The engine's events, in order. Raises EngineError if the process has ended."""
        ...

    async def interrupt(self) -> None:
        """Interrupts the turn; its TurnEnd still follows."""
        ...

    async def stop(self) -> None:
        """Flushes the transcript and ends the process. May be called at any time, and again."""
        ...
