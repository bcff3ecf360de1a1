"""The way to the model out of a sandbox: a unix socket that the session's owner serves.

It takes what the Claude Code CLI asks of a model endpoint and nothing else, puts the session's token in, and relays to the
endpoint of the service. Bodies go through as they come, in both directions, and no faster than they are taken.
"""

import asyncio
import contextlib
import json
import random
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from claude_hitl_template.config import network
from claude_hitl_template.model.http1 import (
    ClientConnection,
    ClientGone,
    Connections,
    Headers,
    end_to_end,
    one_length,
    text_headers,
    while_there,
)
from claude_hitl_template.model.upstream import (
    AWAY,
    COUNT_TOKENS,
    MESSAGES,
    NOT_SENT_BACK,
    SENT_ON,
    SENT_ON_PREFIXES,
    problem,
)

HELLO = "/api/hello"
MAX_BODY_BYTES = 32 * 1024**2  # the API's own limit
# Seconds. The endpoint gives its own upstream 90 s, and says so when they are over.
TIMEOUT = httpx.Timeout(120.0, connect=10.0, pool=5.0)
LIMITS = httpx.Limits(keepalive_expiry=30.0)  # the endpoint keeps an idle connection for longer
LOCAL_URL = "http://model"  # over a unix socket


@dataclass(frozen=True)
class Budget:
    """What one turn may use: `requests` to the model, and bytes of their bodies and answers together."""

    requests: int
    model_bytes: int


class ModelSocket:
    """Serves one session's sandbox until `close`.

    Args:
        url: The endpoint.
        token: What the endpoint takes for a key. Without one every request is refused.
        budget: Of each turn.
        sockets: The folder with the endpoint's unix sockets, if it may be on this machine; they are tried first.
        on_request: Called for each request that is relayed, before its body is read.
    """

    def __init__(
        self,
        url: str,
        token: str,
        budget: Budget,
        sockets: Path | None = None,
        *,
        on_request: Callable[[], None] = lambda: None,
    ) -> None:
        self._url, self.token, self._budget, self._sockets = url.rstrip("/"), token, budget, sockets
        self._on_request = on_request
        self._local: dict[Path, httpx.AsyncClient] = {}
        self._requests = self._bytes = 0
        self._connections = Connections(self._converse)
        # Certificates take long to load, and the endpoint of a service on this machine has none.
        self._client = network.direct_async(timeout=TIMEOUT, verify=url.startswith("https:"))

    async def serve(self, listening: socket.socket) -> None:
        self._connections.serve(await asyncio.start_unix_server(self._connections.accept, sock=listening))

    def new_turn(self) -> None:
        """The budget is whole again."""
        self._requests = self._bytes = 0

    async def close(self) -> None:
        await self._connections.close()
        for client in (self._client, *self._local.values()):
            await client.aclose()

    async def _converse(self, client: ClientConnection) -> None:
        while (request := await client.request()) is not None:
            headers = text_headers(request)
            path, _, query = request.target.decode("latin-1").partition("?")
            method = request.method.decode("latin-1")
            if not self.token:
                await _refuse(client, 403, "no session has been assigned yet")
                return
            if (method, path) in {("GET", HELLO), ("HEAD", HELLO)}:
                await client.start(200, [("content-length", "0")])
                await client.end()
                await _drop(client)
            elif method == "POST" and path in (MESSAGES, COUNT_TOKENS):
                refusal = self._refusal(headers)
                if refusal is not None:
                    await _refuse(client, *refusal)
                    return
                await self._exchange(client, f"{path}?{query}" if query else path, headers)
            else:
                await _refuse(client, 404, "this socket is a way to the model and to nothing else")
                return

    def _refusal(self, headers: Headers) -> tuple[int, str] | None:
        if not one_length(headers):
            return 411, "a request to the model says its length, once"
        length = int(dict(headers)["content-length"])
        if length > MAX_BODY_BYTES:
            return 413, f"a request to the model has {MAX_BODY_BYTES} bytes at most"
        if self._requests >= self._budget.requests:
            return 403, (
                f"this turn made {self._requests} requests to the model, which is the most that one may make "
                "(HITL_TURN_REQUESTS). Send a message to go on"
            )
        if self._bytes + length > self._budget.model_bytes:
            return 403, (
                f"this turn exchanged {self._bytes} bytes with the model, and {self._budget.model_bytes} are the most "
                "(HITL_TURN_MODEL_BYTES). Send a message to go on"
            )
        return None

    async def _exchange(self, client: ClientConnection, target: str, headers: Headers) -> None:
        self._requests += 1
        self._on_request()
        try:
            response = await self._response(target, self._headers(headers), self._counted(client.body()))
        except httpx.TransportError as error:
            await _refuse(
                client, AWAY, f"the service's model endpoint cannot be reached ({type(error).__name__})"
            )
            return
        try:
            kept = [(n, v) for n, v in end_to_end(response.headers.multi_items()) if n not in NOT_SENT_BACK]
            await client.start(response.status_code, kept)
            await while_there(client, self._answer(client, response))
        except httpx.TransportError as error:
            raise ClientGone("the stream of the model broke off") from error
        finally:
            await response.aclose()

    async def _response(self, target: str, headers: Headers, body: AsyncIterator[bytes]) -> httpx.Response:
        """The endpoint's response. A socket that cannot be connected to has taken nothing of the body."""
        for client in self._local_clients():
            with contextlib.suppress(httpx.ConnectError):
                request = client.build_request("POST", f"{LOCAL_URL}{target}", headers=headers, content=body)
                return await client.send(request, stream=True)
        request = self._client.build_request("POST", f"{self._url}{target}", headers=headers, content=body)
        return await self._client.send(request, stream=True)

    def _local_clients(self) -> list[httpx.AsyncClient]:
        """Clients of the sockets that are there now, in any order."""
        paths = list(self._sockets.glob("*.sock")) if self._sockets is not None else []
        random.shuffle(paths)
        for path in paths:
            if path not in self._local:
                transport = httpx.AsyncHTTPTransport(uds=str(path), limits=LIMITS, verify=False)
                self._local[path] = network.direct_async(timeout=TIMEOUT, transport=transport, verify=False)
        return [self._local[path] for path in paths]

    async def _answer(self, client: ClientConnection, response: httpx.Response) -> None:
        async for chunk in response.aiter_raw():
            self._bytes += len(chunk)
            await client.send(chunk)
        await client.end()

    async def _counted(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for chunk in body:
            self._bytes += len(chunk)
            yield chunk

    def _headers(self, sent: Headers) -> Headers:
        kept = [(n, v) for n, v in end_to_end(sent) if n in SENT_ON or n.startswith(SENT_ON_PREFIXES)]
        unencoded = [] if any(n == "accept-encoding" for n, _ in kept) else [("accept-encoding", "identity")]
        return [*kept, *unencoded, ("x-api-key", self.token)]


async def _drop(client: ClientConnection) -> None:
    async for _ in client.body():
        pass


async def _refuse(client: ClientConnection, status: int, text: str) -> None:
    await client.answer(status, "application/json", json.dumps(problem(status, text)).encode())
