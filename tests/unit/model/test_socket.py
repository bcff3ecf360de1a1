"""The socket from a sandbox to the model: only requests to the model pass."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn

from claude_hitl_template.model.socket import Budget, ModelSocket
from tests.serving import loopback

PLENTY = Budget(100, 1024**2)
TOKEN = "hitl-session-one.1.abc"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


class Endpoint:
    """An ASGI application that replaces the service's model endpoint."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.chunks = [b"event: ping\n\n"]
        self.reached = threading.Event()

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        if scope["type"] != "http":
            return
        self.reached.set()
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.requests.append((scope["path"], headers, body))
        kept = [(b"content-type", b"text/event-stream"), (b"set-cookie", b"a=b")]
        await send({"type": "http.response.start", "status": 200, "headers": kept})
        for chunk in self.chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def endpoint() -> Endpoint:
    return Endpoint()


@asynccontextmanager
async def served(
    tmp_path: Path, endpoint: Endpoint, budget: Budget = PLENTY, *, sockets: Path | None = None
) -> AsyncIterator[tuple[ModelSocket, Path]]:
    path = tmp_path / "s"
    with loopback(endpoint) as url:
        one = ModelSocket(f"{url}/model", TOKEN, budget, sockets)
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(path))
        listening.listen()
        await one.serve(listening)
        try:
            yield one, path
        finally:
            await one.close()


def client(path: Path) -> httpx.AsyncClient:
    transport = httpx.AsyncHTTPTransport(uds=str(path))
    return httpx.AsyncClient(transport=transport, base_url="http://model.hitl")


async def raw(path: Path, request: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(request)
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages?beta=true", "/v1/messages/count_tokens"])
async def test_a_request_to_the_model_goes_through_with_the_session_s_token(
    tmp_path: Path, endpoint: Endpoint, path: str
):
    sent = {
        "x-api-key": "placeholder",
        "authorization": "Bearer other",
        "cookie": "c",
        "x-kodosumi_user": "admin",
    }
    async with served(tmp_path, endpoint) as (_, at), client(at) as http:
        answer = await http.post(path, json=BODY, headers={**sent, "anthropic-version": "2023-06-01"})
    assert (answer.status_code, answer.content) == (200, b"event: ping\n\n")
    assert "set-cookie" not in answer.headers
    [(asked, headers, body)] = endpoint.requests
    assert asked == f"/model{path.partition('?')[0]}"
    assert json.loads(body) == BODY
    assert headers["x-api-key"] == TOKEN
    assert headers["anthropic-version"] == "2023-06-01"
    assert not {"authorization", "cookie", "x-kodosumi_user"} & headers.keys()


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/messages"), ("GET", "/api/hello")])
async def test_nothing_goes_through_before_there_is_a_token(
    tmp_path: Path, endpoint: Endpoint, method: str, path: str
):
    async with served(tmp_path, endpoint) as (one, at), client(at) as http:
        one.token = ""
        assert (await http.request(method, path, json=BODY)).status_code == 403
        assert not endpoint.requests
        one.token = TOKEN
        assert (await http.post("/v1/messages", json=BODY)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/messages"), ("POST", "/v1/sessions"), ("GET", "/v1/sessions"), ("POST", "/v1/messages/../sessions"),
        ("POST", "/v1/messages/"), ("POST", "//v1/messages"), ("POST", "http://127.0.0.1:8265/v1/messages"),
        ("POST", "/v1/messages%2f..%2fsessions"), ("CONNECT", "127.0.0.1:8265"), ("POST", "/api/hello"),
        ("PUT", "/v1/messages"),
    ],
)  # fmt: skip
async def test_nothing_else_goes_through(tmp_path: Path, endpoint: Endpoint, method: str, path: str):
    async with served(tmp_path, endpoint) as (_, at):
        answer = await raw(at, f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 404")
    assert endpoint.requests == []


@pytest.mark.parametrize(
    "headers",
    [
        b"transfer-encoding: chunked\r\n",
        b"",
        b"content-length: 2\r\ncontent-length: 30\r\n",
        b"content-length: 2\r\ntransfer-encoding: chunked\r\n",
        b"content-length: -1\r\n",
        b"content-length: 99999999999\r\n",
    ],
)
async def test_a_body_whose_length_is_not_said_once_and_plainly_is_refused(
    tmp_path: Path, endpoint: Endpoint, headers: bytes
):
    smuggled = b"{}POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
    async with served(tmp_path, endpoint) as (_, at):
        answer = await raw(at, b"POST /v1/messages HTTP/1.1\r\nhost: x\r\n" + headers + b"\r\n" + smuggled)
    assert not answer.startswith(b"HTTP/1.1 200")
    assert endpoint.requests == []


async def test_the_probe_of_the_cli_is_answered_here(tmp_path: Path, endpoint: Endpoint):
    async with served(tmp_path, endpoint) as (_, at), client(at) as http:
        assert (await http.get("/api/hello")).status_code == 200
        assert (await http.head("/api/hello")).status_code == 200
    assert endpoint.requests == []


async def test_a_turn_has_a_budget_of_requests_and_the_next_one_has_it_again(
    tmp_path: Path, endpoint: Endpoint
):
    async with served(tmp_path, endpoint, Budget(2, 1024**2)) as (one, at), client(at) as http:
        statuses = [(await http.post("/v1/messages", json=BODY)).status_code for _ in range(3)]
        refused = await http.post("/v1/messages", json=BODY)
        one.new_turn()
        again = await http.post("/v1/messages", json=BODY)
    assert statuses == [200, 200, 403]
    assert "HITL_TURN_REQUESTS" in refused.json()["error"]["message"]
    assert again.status_code == 200


async def test_a_turn_has_a_budget_of_bytes(tmp_path: Path, endpoint: Endpoint):
    endpoint.chunks = [b"x" * 1000] * 5
    async with served(tmp_path, endpoint, Budget(100, 5000)) as (_, at), client(at) as http:
        first = await http.post("/v1/messages", json=BODY)
        second = await http.post("/v1/messages", json=BODY)
    assert (first.status_code, len(first.content)) == (200, 5000)
    assert second.status_code == 403
    assert "HITL_TURN_MODEL_BYTES" in second.json()["error"]["message"]


async def test_an_endpoint_that_cannot_be_reached_is_said_so_that_the_cli_tries_again(tmp_path: Path):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening
        one = ModelSocket(f"http://127.0.0.1:{nobody.getsockname()[1]}", TOKEN, Budget(10, 1024))
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        await one.serve(listening)
        async with client(tmp_path / "s") as http:
            answer = await http.post("/v1/messages", json=BODY)
        await one.close()
    assert answer.status_code == 503
    assert TOKEN not in answer.text


async def test_closing_ends_what_is_under_way(tmp_path: Path, endpoint: Endpoint):
    async with served(tmp_path, endpoint) as (one, at):
        reader, writer = await asyncio.open_unix_connection(str(at))
        writer.write(b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nhalf")
        await asyncio.to_thread(endpoint.reached.wait)
        await one.close()
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()


@contextlib.contextmanager
def bound(path: Path) -> Generator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
        yield made


async def test_a_request_goes_to_the_endpoints_socket_on_this_machine(tmp_path: Path, endpoint: Endpoint):
    sockets, near = tmp_path / "sockets", Endpoint()
    sockets.mkdir()
    with bound(sockets / "1-a.sock") as listening:
        serving = uvicorn.Server(uvicorn.Config(near, lifespan="off", log_level="critical"))
        running = asyncio.create_task(serving.serve(sockets=[listening]))
        async with served(tmp_path, endpoint, sockets=sockets) as (_, at), client(at) as http:
            answers = [await http.post("/v1/messages", json=BODY) for _ in range(3)]
        serving.should_exit = True
        await running
    assert [answer.content for answer in answers] == [b"event: ping\n\n"] * 3
    assert not endpoint.requests
    assert [(path, headers["x-api-key"]) for path, headers, _ in near.requests] == [
        ("/v1/messages", TOKEN)
    ] * 3


async def test_a_request_goes_to_the_url_if_no_socket_answers(tmp_path: Path, endpoint: Endpoint):
    sockets = tmp_path / "sockets"
    async with served(tmp_path, endpoint, sockets=sockets) as (_, at), client(at) as http:
        await http.post("/v1/messages", json=BODY)  # there is no folder, as on another machine
        sockets.mkdir()
        await http.post("/v1/messages", json=BODY)  # there is no socket
        with bound(sockets / "1-a.sock"):
            await http.post("/v1/messages", json=BODY)  # its server has ended
    assert [json.loads(body) for _, _, body in endpoint.requests] == [BODY] * 3
