"""The model endpoint: who may call it, which requests pass, and that the key never leaks."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import SecretStr

from claude_hitl_template.errors import ConfigError, Unauthorized, Unavailable
from claude_hitl_template.model.endpoint import AnthropicUpstream, OfflineUpstream, Upstream, build_router
from claude_hitl_template.model.offline import Scenarios

KEY = "sk-ant-the-real-key"
TOKEN = "hitl-session-s.1.abc"
ASK = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "tools": [{"name": "Bash"}]}


async def verify(token: str) -> None:
    if token != TOKEN:
        raise Unauthorized("not a valid session token")


def app_for(upstream: Upstream) -> FastAPI:
    app = FastAPI()
    app.include_router(build_router(upstream, verify))
    return app


def client_of(upstream: Upstream) -> httpx.AsyncClient:
    """Returns a client of the endpoint with a valid token."""
    transport = httpx.ASGITransport(app_for(upstream))
    return httpx.AsyncClient(transport=transport, base_url="http://endpoint", headers={"x-api-key": TOKEN})


def anthropic(transport: httpx.AsyncBaseTransport, base_url: str = "https://upstream") -> AnthropicUpstream:
    return AnthropicUpstream(base_url, SecretStr(KEY), httpx.AsyncClient(transport=transport))


class FakeAnthropic:
    """An upstream application that records the last request and gives the test's answer."""

    def __init__(self, status: int = 200, content: Any = None, headers: dict[str, str] | None = None) -> None:
        self.url = ""
        self.headers: dict[str, str] = {}
        self.body = b""
        self.app = FastAPI()

        @self.app.post("/{path:path}")
        async def answer(request: Request) -> JSONResponse:
            self.url = str(request.url)
            self.headers = dict(request.headers)
            self.body = await request.body()
            return JSONResponse(content or {"ok": True}, status, headers)

    def client(self, base_url: str = "https://upstream") -> httpx.AsyncClient:
        return client_of(anthropic(httpx.ASGITransport(self.app), base_url))


class ScriptedTransport(httpx.AsyncBaseTransport):
    """An upstream connection whose answer and end the test controls."""

    def __init__(
        self, chunks: Callable[[], AsyncIterator[bytes]] | None = None, error: Exception | None = None
    ) -> None:
        self._chunks = chunks
        self._error = error
        self.received: list[bytes] = []
        self.waiting = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.closed = asyncio.Event()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert isinstance(request.stream, httpx.AsyncByteStream)
        async for piece in request.stream:
            self.received.append(piece)
        if self._error:
            raise self._error
        if not self._chunks:
            await self._hang()
        transport, chunks = self, self._chunks

        class Stream(httpx.AsyncByteStream):
            def __aiter__(self) -> AsyncIterator[bytes]:
                assert chunks
                return chunks()

            async def aclose(self) -> None:
                transport.closed.set()

        return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Stream())

    async def _hang(self) -> None:
        self.waiting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


class Caller:
    """One ASGI request to the endpoint, with a body in pieces and a client that may disconnect."""

    def __init__(self, upstream: Upstream, *body: bytes) -> None:
        self._app = app_for(upstream)
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        for number, piece in enumerate(body, start=1):
            self._messages.put_nowait(
                {"type": "http.request", "body": piece, "more_body": number < len(body)}
            )
        self.sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/messages",
            "raw_path": b"/v1/messages",
            "query_string": b"beta=true",
            "root_path": "",
            "headers": [(b"x-api-key", TOKEN.encode()), (b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }

    def start(self) -> asyncio.Task[None]:
        return asyncio.create_task(self._app(self.scope, self._messages.get, self.sent.put))  # type: ignore[arg-type]

    def hang_up(self) -> None:
        self._messages.put_nowait({"type": "http.disconnect"})


# Who may call


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-api-key": "wrong"},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Basic {TOKEN}"},
        {"x-api-key": KEY},
    ],
)
async def test_without_a_valid_token_nothing_reaches_the_upstream(path: str, headers: dict[str, str]):
    fake = FakeAnthropic()
    async with fake.client() as client:
        del client.headers["x-api-key"]
        response = await client.post(path, json=ASK, headers=headers)

    assert response.status_code == 403
    assert response.json()["type"] == "error"
    assert response.json()["error"]["type"] == "permission_error"
    assert fake.url == ""


@pytest.mark.parametrize("headers", [{"x-api-key": TOKEN}, {"authorization": f"Bearer {TOKEN}"}])
async def test_the_token_is_taken_as_api_key_or_as_bearer(headers: dict[str, str]):
    async with FakeAnthropic().client() as client:
        del client.headers["x-api-key"]
        response = await client.post("/v1/messages", json=ASK, headers=headers)

    assert response.status_code == 200


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_the_probe_of_the_cli_is_answered_without_a_token(method: str):
    async with FakeAnthropic().client() as client:
        assert (await client.request(method, "/api/hello", headers={"x-api-key": ""})).status_code == 200


# What passes through to Anthropic


async def test_the_key_is_put_in_and_what_anthropic_needs_not_know_is_left_out():
    fake = FakeAnthropic()
    async with fake.client() as client:
        await client.post(
            "/v1/messages?beta=true",
            json=ASK,
            headers={
                "authorization": "Bearer other",
                "anthropic-version": "2023-06-01",
                "anthropic-beta": "a,b",
                "x-stainless-lang": "js",
                "cookie": "session=1",
                "x-forwarded-for": "10.0.0.1",
                "x-kodosumi_user": "someone",
            },
        )

    assert fake.headers["x-api-key"] == KEY
    assert (fake.headers["anthropic-version"], fake.headers["anthropic-beta"]) == ("2023-06-01", "a,b")
    assert fake.headers["x-stainless-lang"] == "js"
    assert not {"authorization", "cookie", "x-forwarded-for", "x-kodosumi_user"} & set(fake.headers)
    assert TOKEN not in str(fake.headers)
    assert json.loads(fake.body) == ASK


@pytest.mark.parametrize("base_url", ["https://gateway", "https://gateway/", "https://gateway/team"])
async def test_paths_and_queries_are_kept_below_the_base_url(base_url: str):
    fake = FakeAnthropic()
    async with fake.client(base_url) as client:
        await client.post("/v1/messages?beta=true", json=ASK)
        assert fake.url == base_url.rstrip("/") + "/v1/messages?beta=true"
        await client.post("/v1/messages/count_tokens", json=ASK)
        assert fake.url == base_url.rstrip("/") + "/v1/messages/count_tokens"


@pytest.mark.parametrize("status", [200, 400, 403, 413, 429, 500, 529])
async def test_status_body_and_headers_come_back_as_they_are(status: int):
    content = {"type": "error", "error": {"type": "some_error", "message": "as it was"}}
    fake = FakeAnthropic(status, content, {"retry-after": "7", "request-id": "req_1", "set-cookie": "a=b"})
    async with fake.client() as client:
        response = await client.post("/v1/messages", json=ASK)

    assert (response.status_code, response.json()) == (status, content)
    assert (response.headers["retry-after"], response.headers["request-id"]) == ("7", "req_1")
    assert "set-cookie" not in response.headers


async def test_both_bodies_are_streamed_piece_by_piece():
    gates = [asyncio.Event(), asyncio.Event()]

    async def chunks() -> AsyncIterator[bytes]:
        for number, gate in enumerate(gates):
            await gate.wait()
            yield f"chunk {number}".encode()

    transport = ScriptedTransport(chunks)
    caller = Caller(anthropic(transport), b'{"a":', b"1}")
    running = caller.start()

    assert (await caller.sent.get())["type"] == "http.response.start"
    assert [piece for piece in transport.received if piece] == [b'{"a":', b"1}"]
    for number, gate in enumerate(gates):
        assert caller.sent.empty()
        gate.set()
        assert (await caller.sent.get())["body"] == f"chunk {number}".encode()
    await running
    assert (await caller.sent.get())["more_body"] is False
    assert transport.closed.is_set()


async def test_a_client_that_hangs_up_before_the_answer_cancels_the_call():
    transport = ScriptedTransport()
    caller = Caller(anthropic(transport), b"{}")
    running = caller.start()
    await transport.waiting.wait()
    caller.hang_up()

    await asyncio.wait_for(running, 2)
    assert transport.cancelled.is_set()
    assert caller.sent.empty()


async def test_a_client_that_hangs_up_in_mid_answer_closes_the_call():
    async def chunks() -> AsyncIterator[bytes]:
        yield b"first"
        await asyncio.Event().wait()

    transport = ScriptedTransport(chunks)
    caller = Caller(anthropic(transport), b"{}")
    running = caller.start()
    while (await caller.sent.get()).get("body") != b"first":
        pass
    caller.hang_up()

    await asyncio.wait_for(running, 2)
    assert transport.closed.is_set()


@pytest.mark.parametrize("upstream", [OfflineUpstream(Scenarios()), anthropic(ScriptedTransport())])
async def test_a_client_that_hangs_up_while_it_sends_is_no_error(upstream: Upstream):
    caller = Caller(upstream)
    caller.hang_up()

    await asyncio.wait_for(caller.start(), 2)
    assert caller.sent.empty()


# When Anthropic cannot be reached


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (httpx.ConnectError(f"refused {KEY}"), 503, "api_error"),
        (httpx.RemoteProtocolError("server disconnected"), 503, "api_error"),
        (httpx.LocalProtocolError(f"illegal header {KEY}"), 503, "api_error"),
        (httpx.ConnectTimeout("slow"), 504, "timeout_error"),
        (httpx.ReadTimeout("slow"), 504, "timeout_error"),
        (httpx.PoolTimeout("busy"), 504, "timeout_error"),
    ],
)
async def test_an_unreachable_upstream_is_an_error_in_anthropics_shape_without_the_key(
    error: Exception, status: int, kind: str
):
    async with client_of(anthropic(ScriptedTransport(error=error))) as client:
        response = await client.post("/v1/messages", json=ASK)

    assert response.status_code == status
    assert response.json()["type"] == "error"
    assert response.json()["error"]["type"] == kind
    assert type(error).__name__ in response.json()["error"]["message"]
    assert KEY not in response.text


async def test_a_stream_that_breaks_off_breaks_the_clients_connection_and_names_no_key(
    caplog: pytest.LogCaptureFixture,
):
    async def chunks() -> AsyncIterator[bytes]:
        yield b"first"
        raise httpx.ReadError(f"reset {KEY}")

    transport = ScriptedTransport(chunks)
    caller = Caller(anthropic(transport), b"{}")
    with caplog.at_level(logging.DEBUG), pytest.raises(Unavailable) as caught:
        await caller.start()

    sent = [caller.sent.get_nowait() for _ in range(caller.sent.qsize())]
    assert sent[-1] == {"type": "http.response.body", "body": b"first", "more_body": True}
    assert transport.closed.is_set()
    assert KEY not in str(caught.value) + caplog.text


@pytest.mark.parametrize("key", ["", " ", "sk-ant-ü", "sk-ant\n", " sk-ant", "no sk-ant at all"])
def test_what_cannot_be_a_key_is_refused_at_once_and_not_repeated(key: str):
    with pytest.raises(ConfigError) as caught:
        AnthropicUpstream(
            "https://upstream", SecretStr(key), httpx.AsyncClient(transport=ScriptedTransport())
        )
    assert "sk-ant" not in str(caught.value)


def test_an_upstream_shows_its_key_to_nobody():
    assert KEY not in str(vars(anthropic(ScriptedTransport())))


# The offline upstream


@pytest.fixture
async def offline() -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(OfflineUpstream(Scenarios.load())) as client:
        yield client


def prompt(scenario: str) -> dict[str, Any]:
    return {**ASK, "messages": [{"role": "user", "content": f"```scenario\n{scenario}\n```"}]}


async def test_the_offline_model_streams_or_answers_whole_as_it_is_asked(offline: httpx.AsyncClient):
    whole = await offline.post("/v1/messages", json=ASK)
    streamed = await offline.post("/v1/messages?beta=true", json={**ASK, "stream": True})

    assert whole.json()["content"][0]["text"].startswith("[offline model]")
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.text.startswith("event: message_start\n")
    assert streamed.text.endswith('data: {"type": "message_stop"}\n\n')


async def test_the_offline_model_counts_tokens(offline: httpx.AsyncClient):
    response = await offline.post("/v1/messages/count_tokens", json=ASK)

    assert response.json()["input_tokens"] > 10


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"messages": "hello"}', b"\xff"])
async def test_a_body_that_is_no_request_is_a_400(offline: httpx.AsyncClient, body: bytes):
    response = await offline.post("/v1/messages", content=body)

    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("status", "kind"), [(401, "authentication_error"), (429, "rate_limit_error"), (529, "overloaded_error")]
)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_simulated_failure_has_its_status_and_type(
    offline: httpx.AsyncClient, status: int, kind: str, stream: bool
):
    body = prompt(f"- error: {{status: {status}, retry_after_s: 3, message: as scripted}}")
    response = await offline.post("/v1/messages", json={**body, "stream": stream})

    assert response.status_code == status
    told = response.json()
    assert (told["type"], told["error"]) == ("error", {"type": kind, "message": "as scripted"})
    assert response.headers["retry-after"] == "3"


async def test_a_simulated_cut_breaks_the_connection_of_a_stream_only(offline: httpx.AsyncClient):
    body = prompt("- {text: half, error: {status: cut}}")

    assert (await offline.post("/v1/messages", json=body)).json()["content"][0]["text"] == "half"
    with pytest.raises(Unavailable):
        await offline.post("/v1/messages", json={**body, "stream": True})


async def test_a_simulated_pause_is_between_the_chunks():
    body = prompt("- {text: one two three four, delay_s: 60}")
    caller = Caller(OfflineUpstream(Scenarios()), json.dumps({**body, "stream": True}).encode())
    running = caller.start()

    assert (await caller.sent.get())["type"] == "http.response.start"
    assert b"message_start" in (await caller.sent.get())["body"]
    await asyncio.sleep(0.01)
    assert caller.sent.empty()
    caller.hang_up()
    await asyncio.wait_for(running, 2)
