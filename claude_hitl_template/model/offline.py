"""The offline model: no AI, but a script that speaks Anthropic's Messages API.

It keeps no state. `respond` derives from the conversation in the request which step of which scenario comes
next, so that a session may park, move and resume as with the real model.
"""

import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.model.conversation import HELD_MARKER, Conversation, ToolUse, read
from claude_hitl_template.model.scenario import LABEL, Failure, Scenarios, Step, branches, filled
from claude_hitl_template.presentation.text import without_hook

__all__ = [
    "HELD_MARKER",
    "LABEL",
    "Failure",
    "Reply",
    "Scenarios",
    "Text",
    "Thinking",
    "ToolUse",
    "count_tokens",
    "message",
    "respond",
    "sse",
]

_SHOWN_CHARS = 400
_CHARS_PER_TOKEN = 4
_JSON_PIECE_CHARS = 24
_WORDS = re.compile(r"(?:\S+\s*){1,3}|\s+")
# The CLI asks for the summary of a long conversation within it, with the tools still on offer.
_SUMMARY_REQUEST = "CRITICAL: Respond with TEXT ONLY"


@dataclass(frozen=True)
class Text:
    """Text of the model."""

    text: str


@dataclass(frozen=True)
class Thinking:
    """Thinking before the text. The signature is invented; only Anthropic could check it."""

    text: str


@dataclass(frozen=True)
class Reply:
    """One answer, or with a `failure` the way in which it fails.

    `delay_s` is a pause in seconds between the chunks of its stream; the token counts are estimates.
    """

    blocks: tuple[Text | Thinking | ToolUse, ...] = ()
    failure: Failure | None = None
    delay_s: float = 0.0
    input_tokens: int = 0

    @property
    def stop_reason(self) -> Literal["end_turn", "tool_use"]:
        return "tool_use" if any(isinstance(block, ToolUse) for block in self.blocks) else "end_turn"

    @property
    def output_tokens(self) -> int:
        return 1 + sum(len(json.dumps(_whole(block))) for block in self.blocks) // _CHARS_PER_TOKEN


def respond(body: dict[str, Any], scenarios: Scenarios) -> Reply:
    """The answer to one request, `body` in the form of POST /v1/messages.

    Calls that were held are made again before the scenario goes on. A request without tools is one the CLI
    makes for itself (a title, a summary of a page) and gets a plain answer.
    """
    conversation = read(body.get("messages", ()))
    if not body.get("tools"):
        reply = _says(_aside(body))
    elif conversation.prompt.startswith(_SUMMARY_REQUEST):
        reply = _says(f"{LABEL} I cannot summarise; I only follow scripts.")
    elif conversation.held:
        reply = Reply(tuple(ToolUse(call.name, call.input) for call in conversation.held))
    else:
        reply = _follow(scenarios, conversation)
    return replace(reply, input_tokens=count_tokens(body))


def count_tokens(body: dict[str, Any]) -> int:
    """An estimate of the tokens in a request."""
    counted = {key: body[key] for key in ("system", "messages", "tools") if key in body}
    return 1 + len(json.dumps(counted)) // _CHARS_PER_TOKEN


def _says(text: str) -> Reply:
    return Reply((Text(text),))


def _follow(scenarios: Scenarios, conversation: Conversation) -> Reply:
    try:
        steps = scenarios.steps_for(conversation.prompt)
    except InvalidInput as error:
        return _says(f"{LABEL} I cannot follow this scenario. {error}")
    if not steps:
        return _says(_introduction(scenarios))
    return _played(_next(steps, conversation), conversation)


def _introduction(scenarios: Scenarios) -> str:
    known = "\n".join(f"- {scenario.prompt} ({scenario.description})" for scenario in scenarios.known)
    return (
        f"{LABEL} I am a scripted stand-in, not an AI, and have no script for this. For a real model set an "
        f"Anthropic API key. The scenarios I know:\n{known}"
    )


def _aside(body: dict[str, Any]) -> str:
    """The answer to a request without tools; in JSON if asked for, as it is for a title."""
    schema = (body.get("output_config") or {}).get("format", {}).get("schema")
    if not schema:
        return f"{LABEL} I am a scripted stand-in, not an AI, and have nothing to say to this."
    return json.dumps(dict.fromkeys(schema.get("required", ()), f"{LABEL} session"))


def _next(steps: tuple[Step, ...], conversation: Conversation) -> Step:
    groups = branches(steps)
    if conversation.step >= len(groups):
        return Step(text=f"{LABEL} The scenario is at its end.")
    fitting = (step for step in groups[conversation.step] if _applies(step, conversation))
    return next(fitting, Step(text=f"{LABEL} The scenario has no branch for this outcome; it ends here."))


def _applies(step: Step, conversation: Conversation) -> bool:
    denied = any(result.is_error for result in conversation.results)
    match step.when:
        case None:
            return True
        case "denied":
            return denied
        case "ok":
            return not denied
        case "answered":
            asked = any(result.call.name == "AskUserQuestion" for result in conversation.results)
            return asked and not denied


def _played(step: Step, conversation: Conversation) -> Reply:
    shown = (_shortened(without_hook(r.text) if r.is_error else r.text) for r in conversation.results)
    values = {
        "prompt": conversation.prompt,
        "tool_result": "\n".join(shown),
        "plan_file": conversation.plan_file,
    }
    blocks: list[Text | Thinking | ToolUse] = []
    if step.thinking:
        blocks.append(Thinking(filled(step.thinking, values)))
    if step.text or not step.tools:
        blocks.append(Text(filled(step.text, values) or LABEL))
    blocks += [ToolUse(call.name, filled(call.input, values)) for call in step.tools]
    # An answer that broke off is given whole the second time, or it would never end.
    return Reply(tuple(blocks), None if conversation.cut_off else step.error, step.delay_s)


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + " ..."


def message(reply: Reply, model: str) -> dict[str, Any]:
    """`reply` as the JSON of an answer that is not streamed."""
    return {
        **_envelope(reply, model),
        "content": [_whole(block) for block in reply.blocks],
        "stop_reason": reply.stop_reason,
        "usage": _usage(reply, reply.output_tokens),
    }


def sse(reply: Reply, model: str) -> Iterator[bytes]:
    """`reply` as server-sent events, one per item.

    With the failure "cut" the stream stops short, and its consumer must break the connection off; with
    "malformed" it stops after a line that is not JSON. Failures with a status have no stream.
    """
    broken = reply.failure.status if reply.failure else None
    yield _event("message_start", message=_envelope(reply, model))
    yield _event("ping")
    for index, block in enumerate(reply.blocks):
        last = index == len(reply.blocks) - 1
        yield _event("content_block_start", index=index, content_block=_empty(block))
        for delta in _deltas(block):
            yield _event("content_block_delta", index=index, delta=delta)
            if last and broken:
                if broken == "malformed":
                    yield b"event: content_block_delta\ndata: {not json\n\n"
                return
        yield _event("content_block_stop", index=index)
    yield _event(
        "message_delta",
        delta={"stop_reason": reply.stop_reason, "stop_sequence": None},
        usage={"output_tokens": reply.output_tokens},
    )
    yield _event("message_stop")


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


def _envelope(reply: Reply, model: str) -> dict[str, Any]:
    return {
        "id": f"msg_offline{uuid.uuid4().hex[:20]}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(reply, 1),
    }


def _usage(reply: Reply, output_tokens: int) -> dict[str, int]:
    return {
        "input_tokens": reply.input_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": output_tokens,
    }


def _whole(block: Text | Thinking | ToolUse) -> dict[str, Any]:
    match block:
        case Text(text):
            return {"type": "text", "text": text}
        case Thinking(text):
            return {"type": "thinking", "thinking": text, "signature": "offline"}
        case ToolUse(name, given, identity):
            return {"type": "tool_use", "id": identity, "name": name, "input": given}


def _empty(block: Text | Thinking | ToolUse) -> dict[str, Any]:
    """The block as its stream begins: what the deltas will fill in is empty."""
    hollow = {"text": "", "thinking": "", "signature": "", "input": {}}
    return {key: hollow.get(key, value) for key, value in _whole(block).items()}


def _deltas(block: Text | Thinking | ToolUse) -> Iterator[dict[str, str]]:
    match block:
        case Text(text):
            yield from ({"type": "text_delta", "text": piece} for piece in _WORDS.findall(text))
        case Thinking(text):
            yield from ({"type": "thinking_delta", "thinking": piece} for piece in _WORDS.findall(text))
            yield {"type": "signature_delta", "signature": "offline"}
        case ToolUse(_, given):
            whole = json.dumps(given)
            for start in range(0, len(whole), _JSON_PIECE_CHARS):
                yield {"type": "input_json_delta", "partial_json": whole[start : start + _JSON_PIECE_CHARS]}
