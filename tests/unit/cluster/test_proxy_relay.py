"""Requests to Serve's proxy that go over an ingress's socket: what arrives, what comes back, what goes another way."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from claude_hitl_template.cli.host.processes import ray_environment
from claude_hitl_template.cluster import HTTP_SOCKETS, proxy_relay
from claude_hitl_template.cluster.local_sockets import BEHIND_PROXY, listening, serve_http
from claude_hitl_template.cluster.proxy_relay import Relay
from claude_hitl_template.config.settings import Settings

URL = "/claude-hitl/v1/things"
type App = Callable[[Any, Any, Any], Awaitable[None]]


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s") / HTTP_SOCKETS  # a short path: a socket's may have 107 characters


async def serve_itself(_scope: Any, receive: Any, send: Any) -> None:
    """Stands for Serve's proxy, which has what no ingress takes, and reads the body first."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message.get("more_body", False)
    await answer(send, b"by Serve" + body)


async def answer(send: Any, body: bytes, status: int = 200, headers: Any = ()) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def proxy(folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a real server that has the middleware."""
    bound = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(Relay(serve_itself, folder=folder), lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve(sockets=[bound]))
    base = f"http://127.0.0.1:{bound.getsockname()[1]}"
    async with httpx.AsyncClient(base_url=base, trust_env=False, timeout=20) as client:
        yield client
    server.should_exit = server.force_exit = True
    await serving
    bound.close()


@asynccontextmanager
async def ingress(app: App, folder: Path) -> AsyncIterator[None]:
    serving = asyncio.create_task(serve_http(app, folder, **BEHIND_PROXY))
    async with asyncio.timeout(5):
        while not (folder.exists() and any(path.is_socket() for path in folder.iterdir())):
            await asyncio.sleep(0.005)
    yield
    serving.cancel()
    await asyncio.wait({serving})


@asynccontextmanager
async def raw_ingress(
    converse: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], folder: Path
):  # type: ignore[no-untyped-def]
    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await converse(reader, writer)
        writer.close()

    async with await asyncio.start_unix_server(one, sock=listening(folder)):
        yield


class Seen:
    """An application that remembers requests and gives the answer that it was made with."""

    def __init__(self, status: int = 200, headers: Any = (), body: bytes = b"by an ingress") -> None:
        self.scopes: list[Any] = []
        self.bodies: list[bytes] = []
        self._answer = (body, status, headers)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.bodies.append(body)
        await answer(send, *self._answer)


async def test_a_request_reaches_the_ingress_as_it_came(folder: Path) -> None:
    seen = Seen()
    async with ingress(seen, folder), proxy(folder) as client:
        got = await client.post(
            f"{URL}/a%2Fb%20c?q=%C3%A4&q=2",
            content=b"{}",
            headers={"x-api-key": "k", "te": "trailers", "expect": "x"},
        )
    assert got.text == "by an ingress"
    [scope] = seen.scopes
    assert (scope["method"], scope["raw_path"], scope["query_string"]) == (
        "POST",
        f"{URL}/a%2Fb%20c".encode(),
        b"q=%C3%A4&q=2",
    )
    headers = dict(scope["headers"])
    assert headers[b"x-api-key"] == b"k"
    assert headers[b"host"].startswith(b"127.0.0.1:")
    assert not {b"te", b"expect"} & headers.keys()
    assert seen.bodies == [b"{}"]


async def test_the_ingress_knows_the_client_and_only_from_the_proxy(folder: Path) -> None:
    seen = Seen()
    async with ingress(seen, folder), proxy(folder) as client:
        await client.get(URL)
        # The proxy's server believes a client of this machine, as it does without the middleware.
        await client.get(URL, headers={"x-forwarded-for": "192.0.2.7", "x-forwarded-proto": "https"})
    assert [(scope["client"][0], scope["scheme"]) for scope in seen.scopes] == [
        ("127.0.0.1", "http"),
        ("192.0.2.7", "https"),
    ]


async def test_an_answer_comes_back_as_it_was_given(folder: Path) -> None:
    cookies = [
        (b"set-cookie", b"a=1"),
        (b"set-cookie", b"b=2"),
        (b"content-encoding", b"odd"),
        (b"x-long", b"l" * 30_000),
    ]
    async with (
        ingress(Seen(418, cookies, b"tea"), folder),
        proxy(folder) as client,
        client.stream("GET", URL) as got,
    ):
        raw = b"".join([chunk async for chunk in got.aiter_raw()])
    assert (got.status_code, raw) == (418, b"tea")
    assert got.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert got.headers["x-long"] == "l" * 30_000
    assert len(got.headers.get_list("date")) == 1


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304), ("DELETE", 200)])
async def test_answers_without_a_body_end(folder: Path, method: str, status: int) -> None:
    async with ingress(Seen(status, [], b""), folder), proxy(folder) as client:
        for _ in range(2):  # over one connection of the client
            got = await client.request(method, URL)
            assert (got.status_code, got.content) == (status, b"")


async def test_a_large_body_goes_through_whole_with_its_length_or_in_chunks(folder: Path) -> None:
    large = bytes(range(256)) * 40_000

    async def in_chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(large), 70_000):
            yield large[start : start + 70_000]

    seen = Seen(body=large)
    async with ingress(seen, folder), proxy(folder) as client:
        for content in (large, in_chunks()):
            assert (await client.post(URL, content=content)).content == large
    assert seen.bodies == [large, large]


async def test_each_chunk_of_a_stream_comes_at_once(folder: Path) -> None:
    ask = asyncio.Event()

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(3):
            await send({"type": "http.response.body", "body": b"%d" % number, "more_body": True})
            await ask.wait()
            ask.clear()
        await send({"type": "http.response.body", "body": b"end"})

    async with ingress(app, folder), proxy(folder) as client, client.stream("GET", URL) as got:
        chunks = []
        async for chunk in got.aiter_raw():
            chunks.append(chunk)
            ask.set()
    assert chunks == [b"0", b"1", b"2", b"end"]


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_an_ingress_notices_when_a_client_leaves(folder: Path, method: str) -> None:
    left = asyncio.Event()

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"0", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()

    async with ingress(app, folder), proxy(folder) as client:
        async with client.stream(method, URL) as got:
            await anext(got.aiter_raw())
        async with asyncio.timeout(5):
            await left.wait()


async def test_an_ingress_notices_when_a_client_leaves_in_the_middle_of_its_body(folder: Path) -> None:
    begun, left = asyncio.Event(), asyncio.Event()

    async def app(_scope: Any, receive: Any, _send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            begun.set()
        left.set()

    async with ingress(app, folder), proxy(folder) as client, asyncio.timeout(5):
        _reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        writer.write(f"POST {URL} HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n123".encode())
        await begun.wait()
        writer.close()
        await left.wait()


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/", {}),
        ("/-/routes", {}),
        ("/claude-hitlx", {}),
        ("/other/claude-hitl/", {}),
        (URL, {"x-title": "é".encode()}),  # aiohttp would write this byte as two
    ],
)
async def test_everything_else_goes_serves_way(folder: Path, path: str, headers: Any) -> None:
    async with ingress(Seen(), folder), proxy(folder) as client:
        assert (await client.get(path, headers=headers)).text == "by Serve"


async def test_without_an_ingress_requests_go_serves_way(folder: Path) -> None:
    async with proxy(folder) as client:
        assert (await client.post(URL, content=b"1")).text == "by Serve1"
        async with ingress(Seen(), folder):
            assert (await client.post(URL, content=b"1")).text == "by an ingress"
        assert (await client.get(URL)).text == "by Serve"


async def test_requests_wait_until_an_ingress_that_was_killed_is_replaced(folder: Path) -> None:
    folder.mkdir()
    left, seen = folder / f"{os.getpid()}-0.sock", Seen()
    left.touch()
    async with proxy(folder) as client, asyncio.TaskGroup() as group:
        waiting = [group.create_task(client.post(URL, content=b"%d" % number)) for number in range(20)]
        async with ingress(seen, folder):
            left.unlink()
            assert {(await one).text for one in waiting} == {"by an ingress"}
    assert sorted(seen.bodies) == sorted(b"%d" % number for number in range(20))


async def test_if_it_is_not_replaced_requests_go_serves_way(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_relay, "RESTART_S", 0.2)
    folder.mkdir()
    (folder / f"{os.getpid()}-0.sock").touch()
    async with proxy(folder) as client:
        assert (await client.post(URL, content=b"1")).text == "by Serve1"
        assert (await client.get(URL)).text == "by Serve"


@pytest.mark.parametrize(("method", "times"), [("GET", 2), ("POST", 1)])
async def test_an_ingress_that_dies_before_it_answers(folder: Path, method: str, times: int) -> None:
    """What only reads is sent once more. What may have taken effect is an error that says so."""
    requests = []

    async def ends_at_once(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readuntil(b"\r\n\r\n"))

    async with raw_ingress(ends_at_once, folder), proxy(folder) as client:
        got = await client.request(method, URL)
    assert len(requests) == times
    assert (got.status_code, got.headers["retry-after"]) == (503, "1")
    assert got.json()["error"]["type"] == "overloaded_error"
    assert "Idempotency-Key" in got.json()["error"]["message"]
    assert got.json()["request_id"] == got.headers["request-id"]


async def test_an_ingress_that_dies_in_the_middle_of_its_answer(folder: Path) -> None:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await writer.drain()

    async with raw_ingress(converse, folder), proxy(folder) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get(URL)


def test_the_callback_that_ray_is_given_makes_the_middleware(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = Settings.load().model_copy(update={"data_dir": tmp_path})
    environment = ray_environment(settings)
    module, _, name = environment["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].rpartition(".")
    monkeypatch.setenv("HITL_DATA_DIR", environment["HITL_DATA_DIR"])
    [made] = getattr(import_module(module), name)()
    assert (made.cls, made.kwargs) == (Relay, {"folder": tmp_path / HTTP_SOCKETS})
