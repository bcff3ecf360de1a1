"""A broken stream is resumed without a gap or a repeat; unanswered requests are repeated."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from claude_hitl_template.cli import client as client_module
from claude_hitl_template.cli.client import Client, ServiceFailed
from claude_hitl_template.cli.terminal.follow import Frame, follow, frames
from claude_hitl_template.errors import (
    Conflict,
    HitlError,
    InvalidInput,
    NotFound,
    RateLimited,
    Unauthorized,
    Unavailable,
)
from tests.serving import loopback

EVENTS = [
    {"id": f"e{n}", "type": "agent.message", "content": [{"type": "text", "text": f"{n}\u2028\x85\n"}]}
    for n in range(1, 8)
]
END = {"id": "e8", "type": "session.status_terminated"}


class Script:
    """A service whose stream breaks after every second event, and which fails first as `failures` say."""

    def __init__(self, *failures: int) -> None:
        self.failures, self.cursors, self.keys = list(failures), list[str](), list[str | None]()
        self.app = FastAPI()
        self.app.add_api_route("/v1/sessions/s/events/stream", self.stream)
        self.app.add_api_route("/v1/sessions/{name}", self.session)
        self.app.add_api_route("/v1/decide", self.decide, methods=["POST"])

    async def stream(self, request: Request) -> Any:
        if self.failures:
            return self.fail()
        self.cursors.append(request.headers["last-event-id"])
        after = int(self.cursors[-1])
        return StreamingResponse(self.pieces(after), media_type="text/event-stream")

    def pieces(self, after: int) -> Iterator[str]:
        yield ': connected\n\nevent: ping\ndata: {}\n\ndata: {"type": "event_start"}\n\n'
        for seq, event in list(enumerate([*EVENTS, END], start=1))[after : after + 2]:
            yield f"id: {seq}\nevent: x\ndata: {json.dumps(event, ensure_ascii=False)}\n\n"
        if after + 2 < len(EVENTS):
            yield f"id: {after + 3}\ndata: {{"
            raise ConnectionResetError

    async def session(self, name: str) -> Any:
        return self.fail() if self.failures else {"id": name}

    async def decide(self, request: Request) -> Any:
        self.keys.append(request.headers.get("idempotency-key"))
        return self.fail() if self.failures else {"ok": True}

    def fail(self) -> JSONResponse:
        error = {"type": "error", "error": {"type": "x", "message": "not now"}}
        return JSONResponse(error, status_code=self.failures.pop(0), headers={"retry-after": "0"})


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("claude_hitl_template.cli.terminal.follow.PAUSE_S", 0)
    monkeypatch.setattr(client_module, "FIRST_PAUSE_S", 0.001)


def test_a_broken_stream_is_continued_behind_the_last_whole_event() -> None:
    script, said = Script(), list[str]()
    with loopback(script.app) as url:
        client = Client(url, "key", patience_s=30)
        got = list(follow(client, "s", 0, said.append))
        client.close()
    assert [frame.event for frame in got] == [*EVENTS, END]
    assert [frame.seq for frame in got] == list(range(1, 9))
    assert script.cursors == ["0", "2", "4", "6"]
    assert len(said) == 3
    assert all("going on" in line for line in said)


def test_following_begins_behind_what_was_seen() -> None:
    script = Script()
    with loopback(script.app) as url:
        client = Client(url, "key")
        got = list(follow(client, "s", 6, lambda _: None))
        client.close()
    assert [frame.seq for frame in got] == [7, 8]


def test_what_asks_to_wait_is_asked_again_and_said() -> None:
    script, said = Script(503, 429), list[str]()
    with loopback(script.app) as url:
        client = Client(url, "key", patience_s=30, say=said.append)
        assert client.post("/v1/decide") == {"ok": True}
        client.close()
    assert len(said) == 2
    assert "trying again" in said[0]
    assert len(set(script.keys)) == 1, "asking again must not do it twice"
    assert script.keys[0]


def test_patience_ends() -> None:
    script = Script(503)
    with loopback(script.app) as url:
        client = Client(url, "key")
        with pytest.raises(Unavailable):
            client.get("/v1/sessions/s")
        client.close()


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidInput),
        (401, Unauthorized),
        (404, NotFound),
        (409, Conflict),
        (429, RateLimited),
        (503, Unavailable),
        (500, ServiceFailed),
        (502, ServiceFailed),
    ],
)
def test_each_refusal_is_told_apart(status: int, kind: type[HitlError]) -> None:
    script = Script(status)
    with loopback(script.app) as url:
        client = Client(url, "a-secret-key")
        with pytest.raises(kind, match="not now") as raised:
            client.get("/v1/sessions/s")
        client.close()
    assert "a-secret-key" not in str(raised.value)


def test_nobody_there_says_how_to_start_it(free_port: int) -> None:
    client = Client(f"http://127.0.0.1:{free_port}", "key")
    with pytest.raises(Unavailable, match=r"\./hitl up"):
        client.get("/v1/version")
    client.close()


def test_frames_hold_only_whole_messages() -> None:
    lines = iter(["id: 4", "data: {", "data: }", "", ": note", "", "data: 1", "", "id: 5", "data: {}"])
    assert list(frames(lines)) == [Frame(4, {}), Frame(None, 1)]  # pyright: ignore[reportArgumentType]
