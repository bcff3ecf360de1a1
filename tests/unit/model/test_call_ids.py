"""The endpoint makes ids of calls unique for the CLI, and sends the model's server its own ids."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from claude_hitl_template.model.call_ids import UniqueCallIds
from claude_hitl_template.model.offline import Reply, ToolUse, message, sse
from claude_hitl_template.model.upstream import Answer, Call

OWN = "toolu_01A09q90qw90lq917835lq9"


class Upstream:
    def __init__(self, kind: str, *chunks: bytes) -> None:
        self.kind, self.chunks, self.got = kind, chunks, b""

    @asynccontextmanager
    async def call(self, call: Call) -> AsyncIterator[Answer]:
        self.got = b"".join([piece async for piece in call.body])
        yield Answer(200, {"content-type": self.kind, "content-length": "1"}, pieces(*self.chunks))


async def pieces(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def ask(upstream: Upstream, *body: bytes) -> bytes:
    call = Call("/v1/messages", "", {}, pieces(*body))
    async with UniqueCallIds(upstream).call(call) as answer:
        return b"".join([chunk async for chunk in answer.chunks])


def split(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def ids(answer: bytes) -> list[str]:
    events = [json.loads(line[5:]) for line in answer.split(b"\n") if line.startswith(b"data:")]
    blocks = [e["content_block"] for e in events if e["type"] == "content_block_start"]
    return [b["id"] for b in blocks]


def answer(*identities: Any) -> Reply:
    return Reply(
        tuple(ToolUse("Bash", {"command": 'echo "type": "tool_use"'}, identity) for identity in identities)
    )


@pytest.mark.parametrize("size", [1, 7, 100_000])
async def test_what_has_ids_of_its_own_passes_as_it_is(size: int):
    stream = b"".join(sse(answer(OWN), "model"))
    body = json.dumps({"messages": [{"role": "user", "content": "hitl_ is a word, hitl_0123 too"}]}).encode()
    upstream = Upstream("text/event-stream", *split(stream, size))
    assert await ask(upstream, *split(body, size)) == stream
    assert upstream.got == body


@pytest.mark.parametrize("size", [1, 7, 100_000])
@pytest.mark.parametrize("given", ["call_0", "", None, "functions.Bash:0", "a" * 949, 'q"\\\u00e9/../'])
async def test_no_two_calls_have_one_id_and_the_server_gets_its_own_back(size: int, given: Any):
    upstream = Upstream("text/event-stream", *split(b"".join(sse(answer(given, given), "model")), size))
    first, second = ids(await ask(upstream, b"{}"))
    assert first != second
    told = json.dumps({"messages": [{"id": first}, {"tool_use_id": second}]}, ensure_ascii=False).encode()
    await ask(upstream, *split(told, size))
    assert len(upstream.got) == len(told)
    assert json.loads(upstream.got) == {"messages": [{"id": given or ""}, {"tool_use_id": given or ""}]}


async def test_an_id_of_anthropics_kind_that_the_conversation_has_is_changed():
    upstream = Upstream("text/event-stream", *sse(answer(OWN, OWN), "model"))
    first, second = ids(await ask(upstream, b"{}"))
    assert first == OWN
    assert second != OWN
    assert OWN not in ids(await ask(upstream, json.dumps({"id": OWN}).encode()))


async def test_an_answer_that_is_not_streamed_is_changed_as_well():
    upstream = Upstream("application/json", json.dumps(message(answer("call_0", "call_0"), "model")).encode())
    found = json.loads(await ask(upstream, b"{}"))
    first, second = (block["id"] for block in found["content"])
    assert first != second


@pytest.mark.parametrize(
    "line", [b'data: {"type": "tool_use", content_block_start', b"data: [1]", b"event: x"]
)
async def test_what_is_not_understood_passes_as_it_is(line: bytes):
    assert await ask(Upstream("text/event-stream", line), b"{}") == line
