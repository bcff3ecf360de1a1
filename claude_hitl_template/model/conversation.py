"""Reads the state of a conversation from the `messages` of one Messages API request.

The Claude Code CLI (2.1.330) adds to a conversation, as measured:
messages of role `system` stand between the others; a user's text shares its message with `<system-reminder>`
blocks, and after an interruption also with tool results; a resumed session gets "Continue from where you left
off." next to them; what a user sends while the model works arrives in a `system` message. When a stream breaks
off after a finished block of text, the CLI keeps that block and asks for the rest in a user message.
"""

import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from claude_hitl_template.domain.events import CONTINUE, DECIDED, HOSTS_DECIDED, REFUSED

HELD_MARKER = "held: another call of this batch waits for a human"
"""In the result of a call that was put off because an earlier call of its batch waits for a decision."""

_REMINDER = re.compile(r"<system-reminder>.*?</system-reminder>", re.DOTALL)
_CUT_OFF = "Your response above was cut off mid-stream"
_NOT_SAID_BY_THE_USER = (
    "<local-command-",
    "<command-name>",
    "<command-message>",
    "<task-notification>",
    "[Request interrupted",
    "Continue from where you left off",
    "This session is being continued from",
    _CUT_OFF,
)
_CONTINUE = re.compile(r"(please )?continue[.!]?", re.IGNORECASE)
_SAID_MEANWHILE = re.compile(
    r"The user sent a new message while you were working:\n(.*?)(?:\n\nThis is how Claude Code|\Z)", re.DOTALL
)
_PLAN_FILE = re.compile(r"plan (?:file already exists )?at (/\S+\.md)")
# The CLI puts this where an assistant message is missing, so that user and assistant alternate.
_FILLER = "No response requested."


def new_tool_use_id() -> str:
    return f"toolu_offline{uuid.uuid4().hex[:20]}"


@dataclass(frozen=True)
class ToolUse:
    """One call of a tool. `id` is unique; it is what the approval and the result of the call refer to."""

    name: str
    input: dict[str, Any]
    id: str = field(default_factory=new_tool_use_id)


@dataclass(frozen=True)
class ToolResult:
    """How one call ended. `text` is without the CLI's reminders."""

    call: ToolUse
    text: str
    is_error: bool

    @property
    def held(self) -> bool:
        return self.is_error and HELD_MARKER in self.text


@dataclass(frozen=True)
class Conversation:
    """`prompt` is the user's last one, "" if there is none.

    `step` counts the assistant's turns since then, without those that only repeat held calls. `results` are
    of the last step, over all repetitions of its held calls; a held one is among them only until its call
    is made again. `plan_file` is where the CLI wants a plan to be written, "" outside plan mode.
    `cut_off`: the last answer broke off; it is not counted, and is to be given again.
    """

    prompt: str = ""
    step: int = 0
    results: tuple[ToolResult, ...] = ()
    plan_file: str = ""
    cut_off: bool = False

    @property
    def held(self) -> tuple[ToolUse, ...]:
        return tuple(result.call for result in self.results if result.held)


def read(messages: Iterable[dict[str, Any]]) -> Conversation:
    """The state of a conversation, given as the `messages` field of a request."""
    prompt, step, plan_file = "", 0, ""
    calls: dict[str, ToolUse] = {}
    results: list[ToolResult] = []
    before, cut_off = (step, results), False
    for role, blocks in _turns(messages):
        if role == "assistant":
            if [block.get("text") for block in blocks] == [_FILLER]:
                continue
            before, cut_off = (step, results), False
            repeats = any(result.held for result in results)
            results = [result for result in results if not result.held] if repeats else []
            step += not repeats
            calls |= {call.id: call for call in _calls(blocks)}
            continue
        if role == "user" and _CUT_OFF in _text(blocks):
            (step, results), cut_off = before, True
        results = [
            *results,
            *(_result(block, calls) for block in blocks if block.get("type") == "tool_result"),
        ]
        message_text = _said(role, blocks)
        if message_text.startswith(DECIDED):
            results += _decided(message_text)
        elif message_text and not message_text.startswith((CONTINUE, HOSTS_DECIDED)):
            prompt, step, cut_off = message_text, 0, False
            # A prompt ends what came before; one sent while the model works leaves held calls standing.
            results = results if role == "system" else []
        plan_file = next(reversed(_PLAN_FILE.findall(_text(blocks))), plan_file)
    return Conversation(prompt, step, tuple(results), plan_file, cut_off)


def _turns(messages: Iterable[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(role, blocks) of each turn. Assistant messages in a row are one turn: the CLI may split an answer."""
    for role, group in groupby(messages, key=lambda message: str(message.get("role"))):
        contents = [_blocks(message.get("content")) for message in group]
        if role == "assistant":
            yield role, [block for blocks in contents for block in blocks]
        else:
            yield from ((role, blocks) for blocks in contents)


def _blocks(content: Any) -> list[dict[str, Any]]:
    return list(content) if isinstance(content, list) else [{"type": "text", "text": str(content or "")}]


def _text(content: Any) -> str:
    return "\n".join(str(block["text"]) for block in _blocks(content) if "text" in block)


def _calls(blocks: list[dict[str, Any]]) -> list[ToolUse]:
    uses = (block for block in blocks if block.get("type") == "tool_use")
    return [ToolUse(str(use["name"]), _fields(use["input"]), str(use["id"])) for use in uses]


def _fields(given: object) -> dict[str, Any]:
    """The CLI repeats what it was sent, and that may have been no object."""
    return dict(given) if isinstance(given, Mapping) else {}


def _result(block: dict[str, Any], calls: dict[str, ToolUse]) -> ToolResult:
    identity = str(block.get("tool_use_id"))
    call = calls.get(identity, ToolUse("unknown", {}, identity))
    return ToolResult(call, _without_reminders(_text(block.get("content"))), bool(block.get("is_error")))


def _decided(message_text: str) -> list[ToolResult]:
    """Results from a reminder of held calls, one JSON object a line: to be issued again, or refused."""
    try:
        of_calls, _, _ = message_text.partition(HOSTS_DECIDED)
        named = [json.loads(line) for line in of_calls.splitlines()[1:] if line != REFUSED]
        return [
            ToolResult(
                ToolUse(str(call["name"]), dict(call["input"])),
                str(call.get("refused", HELD_MARKER)),
                is_error=True,
            )
            for call in named
        ]
    except (ValueError, TypeError, KeyError, AttributeError):  # other text with the same beginning
        return []


def _said(role: str, blocks: list[dict[str, Any]]) -> str:
    """The user's text in this message; "" if only the CLI added text."""
    if role == "system":
        meanwhile = _SAID_MEANWHILE.search(_text(blocks))
        return meanwhile[1].strip() if meanwhile else ""
    texts = (_without_reminders(block["text"]) for block in reversed(blocks) if block.get("type") == "text")
    return next((text for text in texts if text and not _is_note(text)), "")


def _is_note(text: str) -> bool:
    return text.startswith(_NOT_SAID_BY_THE_USER) or _CONTINUE.fullmatch(text) is not None


def _without_reminders(text: str) -> str:
    return _REMINDER.sub("", text).strip()
