"""Makes a server's tool call ids unique on the way to the CLI, and restores them on the way to the server.

Some servers restart their ids with each answer, or send none. The CLI (2.1.330) runs such calls, but the next request
to the model has only the first call of an id, so the model would issue the others for ever. Therefore an id that does
not look like Anthropic's, or that the conversation has already, gets a random mark in front. No state is kept: the mark
is removed from requests wherever it occurs, and blanks at the end of the body keep its length.
"""

import json
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from claude_hitl_template.model.upstream import Answer, Call, Upstream

_OWN_KIND = re.compile(r"(srv)?toolu_\w{16,}")
_MARK = re.compile(rb"hitl_[0-9a-f]{16}_")
_MARK_BYTES = 22
_USE = re.compile(rb'"type"\s*:\s*"(server_)?tool_use"')


class UniqueCallIds:
    """An upstream whose answers have unique call ids. Compressed bodies are passed on unchanged."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    @asynccontextmanager
    async def call(self, call: Call) -> AsyncGenerator[Answer]:
        request = _Request(call.body)
        async with self._upstream.call(replace(call, body=request.pieces())) as answer:
            kind = answer.headers.get("content-type", "")
            if answer.headers.get("content-encoding", "identity") != "identity":
                yield answer
            elif kind.startswith("text/event-stream"):
                yield replace(answer, chunks=_stream(answer.chunks, request))
            elif kind.startswith("application/json") and answer.status == 200:
                yield await _whole(answer, request)
            else:
                yield answer


class _Request:
    """The id as the model sees it: without marks. `known` ids are in it, or in the answer so far."""

    def __init__(self, body: AsyncIterator[bytes]) -> None:
        self._body = body
        self._told = bytearray()
        self._given: set[str] = set()

    async def pieces(self) -> AsyncIterator[bytes]:
        left, removed = b"", 0
        async for piece in self._body:
            data, marks = _MARK.subn(b"", left + piece)
            removed += marks * _MARK_BYTES
            end = _undecided(data)
            data, left = data[:end], data[end:]
            self._told += data
            if data:
                yield data
        self._told += left
        if left or removed:
            yield left + b" " * removed

    def renamed(self, block: Mapping[str, Any]) -> dict[str, Any]:
        """The block of a call, with a unique id."""
        given = str(block.get("id") or "")
        fresh = bool(_OWN_KIND.fullmatch(given)) and given not in self._given and not self._has(given)
        self._given.add(given)
        return {**block, "id": given if fresh else f"hitl_{secrets.token_hex(8)}_{given}"}

    def _has(self, identity: str) -> bool:
        return json.dumps(identity).encode() in self._told


def _undecided(data: bytes) -> int:
    """Start of a mark that may continue in the next chunk; the length of `data` if there is none."""
    for start in range(max(len(data) - _MARK_BYTES + 1, 0), len(data)):
        tail = data[start:]
        if _MARK.fullmatch(tail + b"hitl_0000000000000000_"[len(tail) :]):
            return start
    return len(data)


async def _stream(chunks: AsyncIterator[bytes], request: _Request) -> AsyncIterator[bytes]:
    """Whole lines of data, and all else as it comes."""
    left = b""
    async for chunk in chunks:
        *lines, left = (left + chunk).split(b"\n")
        done = b"".join(_line(line, request) + b"\n" for line in lines)
        if not left.startswith(b"data:"[: len(left)]):
            done, left = done + left, b""
        if done:
            yield done
    if left:
        yield left


def _line(line: bytes, request: _Request) -> bytes:
    if not line.startswith(b"data:") or not _USE.search(line) or b"content_block_start" not in line:
        return line
    try:
        event = json.loads(line.removeprefix(b"data:"))
        event["content_block"] = request.renamed(event["content_block"])
    except (ValueError, KeyError, TypeError):  # not the Messages protocol: pass it on unchanged
        return line
    return b"data: " + json.dumps(event).encode()


async def _whole(answer: Answer, request: _Request) -> Answer:
    raw = b"".join([chunk async for chunk in answer.chunks])
    headers = dict(answer.headers)
    if _USE.search(raw):
        try:
            message = json.loads(raw)
            message["content"] = [
                request.renamed(b) if b.get("type") in ("tool_use", "server_tool_use") else b
                for b in message["content"]
            ]
            raw = json.dumps(message).encode()
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ):  # not the Messages protocol: pass it on unchanged
            pass
        headers.pop("content-length", None)

    async def once() -> AsyncIterator[bytes]:
        yield raw

    return replace(answer, headers=headers, chunks=once())
