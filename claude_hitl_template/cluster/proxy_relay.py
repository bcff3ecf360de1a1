"""In Serve's proxy: requests for the service go over an ingress's unix socket, instead of through Serve's handles.

Serve's own way costs 2 ms of processor time for a request, and 0.25 ms for each chunk of an answer: with 200 streams of a
session, that was more than everything else of a turn. Where no ingress takes a connection, a request goes Serve's way.

The proxy imports this, so it imports little. `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names `middlewares`.
"""

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path

import aiohttp
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from yarl import URL

from claude_hitl_template.cluster import HTTP_SOCKETS, ROUTE
from claude_hitl_template.model.http1 import Headers, end_to_end

# What the ingress may believe only when it comes from here.
_NOT_SENT_ON = ("expect", "x-forwarded-for", "x-forwarded-proto")
RESTART_S = 30.0  # in which Serve replaces an ingress that was killed, on a busy machine, too
POLL_S = 0.1
_LINE_BYTES = 64 * 1024  # of the answer's headers


def middlewares() -> list[Middleware]:
    """Called by Serve's proxy when it starts, in the environment that `hitl up` made."""
    return [Middleware(Relay, folder=Path(os.environ["HITL_DATA_DIR"]) / HTTP_SOCKETS)]


class _NotTaken(Exception):
    """No ingress took the connection."""


class Relay:
    """An ASGI middleware. `folder` has the ingresses' sockets; `app` is Serve's proxy."""

    def __init__(self, app: ASGIApp, *, folder: Path) -> None:
        self._app, self._folder = app, folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _is_ours(scope):
            request, deadline = _Request(scope, receive), time.monotonic() + RESTART_S
            # A socket that takes no connection is that of an ingress that was killed: Serve starts another.
            while (there := self._sockets()) and time.monotonic() < deadline:
                for path in there:
                    with suppress(_NotTaken):
                        await _relay(path, request, send)
                        return
                await asyncio.sleep(POLL_S)
            receive = request.from_the_start
        await self._app(scope, receive, send)

    def _sockets(self) -> list[str]:
        """The sockets that are there, in any order."""
        try:
            there = [entry.path for entry in os.scandir(self._folder) if entry.name.endswith(".sock")]
        except OSError:
            return []
        random.shuffle(there)
        return there


async def _relay(path: str, request: "_Request", send: Send) -> None:
    """Relays until the answer has been sent or the client has gone. Raises _NotTaken."""
    relaying = asyncio.ensure_future(_exchange(path, request, send))
    leaving = asyncio.ensure_future(request.disconnected())
    try:
        await asyncio.wait({relaying, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if relaying.done():
            relaying.result()
    finally:
        relaying.cancel()
        leaving.cancel()


class _Request:
    """A client's request, as it is sent on."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.scope, self.receive, self._read = scope, receive, asyncio.Event()
        self.method: str = scope["method"]
        self.url = URL.build(
            scheme="http",
            host="ingress",
            path=scope["raw_path"].decode("ascii"),
            query_string=scope["query_string"].decode("ascii"),
            encoded=True,
        )
        given = end_to_end(_text(scope["headers"]))
        self.headers = [(name, value) for name, value in given if name not in _NOT_SENT_ON]
        self.headers.append(("x-forwarded-proto", scope["scheme"]))
        if scope.get("client"):
            self.headers.append(("x-forwarded-for", scope["client"][0]))
        names = {name for name, _ in scope["headers"]}
        self.has_body = bool(names & {b"content-length", b"transfer-encoding"})
        self._is_gone = False
        self._unsent: Message | None = None  # that there is no body
        if not self.has_body:
            self._read.set()

    def sent_by(self, client: aiohttp.ClientSession) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return client.request(
            self.method,
            self.url,
            headers=self.headers,
            data=self._body() if self.has_body else None,
            allow_redirects=False,
        )

    async def _body(self) -> AsyncIterator[bytes]:
        """The body as it comes. When the client leaves in the middle of it, it does not end: `disconnected` does."""
        more = True
        while more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                self._is_gone = True
                self._read.set()
                await asyncio.Future()
            yield message.get("body", b"")
            more = message.get("more_body", False)
        self._read.set()

    async def disconnected(self) -> None:
        """Returns when the client has gone."""
        await self._read.wait()
        while not self._is_gone:
            message = await self.receive()
            self._is_gone = message["type"] == "http.disconnect"
            if not self._is_gone:
                self._unsent = message

    async def from_the_start(self) -> Message:
        """An ASGI `receive` for a request of which no ingress has taken anything."""
        message, self._unsent = self._unsent, None
        return message or await self.receive()


async def _exchange(path: str, request: _Request, send: Send) -> None:
    begun = False
    try:
        async with _client(path) as client, request.sent_by(client) as answer:
            given = end_to_end(_text(answer.raw_headers))
            headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in given]
            begun = True
            await send({"type": "http.response.start", "status": answer.status, "headers": headers})
            async for chunk in answer.content.iter_any():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
    except aiohttp.ClientConnectorError as error:
        raise _NotTaken from error
    except aiohttp.ClientError:  # which has repeated an idempotent request already
        if begun:
            return  # the answer has no end, so uvicorn closes the connection and the client sees that
        from claude_hitl_template.api.request_ids import with_request_ids  # noqa: PLC0415  (hardly ever needed)

        await with_request_ids(_away)(request.scope, request.receive, send)


async def _away(scope: Scope, receive: Receive, send: Send) -> None:
    """The API's error for a request that may or may not have taken effect."""
    from claude_hitl_template.api.problems import problem  # noqa: PLC0415

    message = "the service ended in the middle of this request; repeat it, with the same Idempotency-Key"
    await problem(503, "overloaded_error", message, {"retry-after": "1"})(scope, receive, send)


def _text(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]


def _is_ours(scope: Scope) -> bool:
    """Whether the path is the service's. What aiohttp would write otherwise than it came goes Serve's way."""
    path = scope["path"]
    if path != ROUTE and not path.startswith(f"{ROUTE}/"):
        return False
    parts = [
        scope["raw_path"],
        scope["query_string"],
        *(part for header in scope["headers"] for part in header),
    ]
    return all(part.isascii() for part in parts)


def _client(path: str) -> aiohttp.ClientSession:
    """A client for one request. A connection that was kept might end as it is used, and then it would not be known whether
    the request was taken."""
    return aiohttp.ClientSession(
        connector=aiohttp.UnixConnector(path, force_close=True),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        timeout=aiohttp.ClientTimeout(total=None),
        max_line_size=_LINE_BYTES,
        max_field_size=_LINE_BYTES,
    )
