"""The SDK's messages, as engine events."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from claude_agent_sdk import (
    AssistantMessage,
    ResultMessage,
    StreamEvent,
    SystemMessage,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    UserMessage,
)
from claude_agent_sdk.types import MirrorErrorMessage

from claude_hitl_template.domain.models import Usage, new_id
from claude_hitl_template.errors import EngineError
from claude_hitl_template.session import engine

_TOKENS = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
SERVER_DOWN = ("failed", "needs-auth")
CLI_ITSELF = "<synthetic>"  # the model's name in messages that no model wrote
ERROR_KINDS = {
    401: "model_request_failed_error",
    402: "billing_error",
    429: "model_rate_limited_error",
    503: "model_overloaded_error",
    529: "model_overloaded_error",
}


class Reader:
    """Turns one process's messages into events. Keeps what the protocol leaves implicit: block numbers, costs so far."""

    def __init__(self, transcript_id: str = "") -> None:
        self._transcript_id = transcript_id
        self._streamed = ""  # the id of the message that is streamed, as the model's server gave it
        self._ours: dict[str, str] = {}  # ours by theirs: some servers give all their messages one id
        self._blocks: dict[str, int] = {}
        self._cost_usd = 0.0
        self._down: set[str] = set()

    def read(self, message: object) -> Iterator[engine.EngineEvent]:
        match message:
            case StreamEvent(parent_tool_use_id=None):
                yield from self._stream(message.event)
            case AssistantMessage(model=model) if model == CLI_ITSELF and message.error is not None:
                return  # the CLI's text for a failure of the model; the turn's end reports it as an error
            case AssistantMessage():
                yield from self._assistant(message)
            case UserMessage(content=list()):
                yield from _results(message)
            case ResultMessage():
                if self._transcript_id and message.session_id not in ("", self._transcript_id):
                    self._transcript_id = message.session_id
                    yield engine.Conversation(message.session_id)
                yield self._result(message)
            case MirrorErrorMessage():
                raise EngineError(f"the transcript could not be saved: {message.error}")
            case SystemMessage(subtype="api_retry"):
                yield _retrying(message.data)
            case SystemMessage(subtype="init"):
                yield from self._servers(message.data)
            case _:
                return

    def _stream(self, event: Mapping[str, Any]) -> Iterator[engine.EngineEvent]:
        match event.get("type"):
            case "message_start":
                self._streamed = str(event["message"]["id"])
                self._ours[self._streamed] = new_id("msg")
                self._usage = _counts(event["message"].get("usage"))
                yield engine.RequestStart(self._message_id)
            case "content_block_start":
                kind = {"text": "agent.message", "thinking": "agent.thinking"}.get(
                    event["content_block"]["type"]
                )
                if kind:
                    yield engine.Preview(_event_id(self._message_id, event["index"]), kind, None)
            case "content_block_delta" if event["delta"].get("type") == "text_delta":
                event_id = _event_id(self._message_id, event["index"])
                yield engine.Preview(event_id, "agent.message", event["delta"]["text"])
            case "message_delta":
                self._usage |= {k: v for k, v in _counts(event.get("usage")).items() if v}
            case "message_stop":
                yield engine.RequestEnd(self._message_id, self._usage)
            case _:
                return

    @property
    def _message_id(self) -> str:
        return self._ours[self._streamed]

    def _servers(self, data: Mapping[str, Any]) -> Iterator[engine.ServerDown]:
        """Each turn begins with the state of all MCP servers; a server that goes down is reported once."""
        down = {s["name"] for s in data.get("mcp_servers") or () if s["status"] in SERVER_DOWN}
        yield from map(engine.ServerDown, sorted(down - self._down))
        self._down = down

    def _assistant(self, message: AssistantMessage) -> Iterator[engine.EngineEvent]:
        thread = message.parent_tool_use_id
        theirs = message.message_id or message.uuid or "message"
        key = theirs if thread is None else f"{thread} {theirs}"
        message_id = self._ours.setdefault(key, new_id("msg"))
        for block in message.content:
            index = self._blocks.get(message_id, 0)
            self._blocks[message_id] = index + 1
            match block:
                case TextBlock():
                    yield engine.Text(_event_id(message_id, index), block.text, thread)
                case ThinkingBlock():
                    yield engine.Thinking(_event_id(message_id, index), thread)
                case ToolUseBlock():
                    yield engine.ToolUse(block.id, block.name, _input(block.input), thread)
                case _:
                    continue

    def _result(self, message: ResultMessage) -> engine.TurnEnd:
        cost = (message.total_cost_usd or 0.0) - self._cost_usd
        self._cost_usd += cost
        usage = Usage(**_counts(message.usage), cost_usd=max(cost, 0.0))
        if message.deferred_tool_use is not None:
            return engine.TurnEnd(usage, deferred=message.deferred_tool_use.id)
        if (message.terminal_reason or "").startswith("aborted"):
            return engine.TurnEnd(usage, interrupted=True)
        if message.is_error:
            return engine.TurnEnd(usage, error=_error(message))
        return engine.TurnEnd(usage)


def _error(message: ResultMessage) -> tuple[str, str]:
    text = "; ".join(message.errors or ()) or message.result or message.subtype
    status = message.api_error_status  # None: the connection broke, or it was no matter of the model
    of_the_model = status is not None or message.terminal_reason == "api_error"
    return ERROR_KINDS.get(
        status or 0, "model_request_failed_error" if of_the_model else "unknown_error"
    ), text


def _retrying(data: Mapping[str, Any]) -> engine.Retrying:
    status = data.get("error_status")  # None: the connection broke
    kind = ERROR_KINDS.get(status or 0, "model_request_failed_error")
    attempt, most = data.get("attempt", "?"), data.get("max_retries", "?")
    shown = f"HTTP {status}" if status else "the connection broke"
    return engine.Retrying(kind, f"The model did not answer ({shown}); trying again, {attempt} of {most}.")


def _results(message: UserMessage) -> Iterator[engine.EngineEvent]:
    for block in message.content:
        if isinstance(block, ToolResultBlock):
            yield engine.ToolResult(
                block.tool_use_id, _content(block.content), bool(block.is_error), message.parent_tool_use_id
            )


def _input(given: object) -> dict[str, Any]:
    """The CLI refuses an input that is not an object; it is shown unchanged."""
    return given if isinstance(given, dict) else {"__unparsedToolInput": given}


def _content(content: str | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Result content in the wire protocol's block types; what it does not have becomes JSON text."""
    if content is None or isinstance(content, str):
        return [{"type": "text", "text": content or ""}]
    return [_block(block) for block in content]


def _block(block: Mapping[str, Any]) -> dict[str, Any]:
    if block.get("type") == "text":
        return {"type": "text", "text": str(block.get("text", ""))}
    source = block.get("source")
    if block.get("type") == "image" and isinstance(source, Mapping) and source.get("type") == "base64":
        kept = {name: source.get(name, "") for name in ("type", "media_type", "data")}
        return {"type": "image", "source": kept}
    return {"type": "text", "text": json.dumps(block, ensure_ascii=False)}


def _counts(usage: Mapping[str, Any] | None) -> dict[str, int]:
    return {name: int((usage or {}).get(name) or 0) for name in _TOKENS}


def _event_id(message_id: str, index: int) -> str:
    return f"sevt_{message_id}_{index}"
