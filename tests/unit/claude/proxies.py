"""Serves the proxy of a sandbox without one, and makes requests through it."""

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx

from claude_hitl_template.claude.egress import Egress
from claude_hitl_template.config.addresses import Resolve, may_reach, resolve
from claude_hitl_template.domain.models import Environment
from claude_hitl_template.session.hosts import Access, HostGate


class Unasked(HostGate):
    """A gate with no listed hosts but MCP servers', and without a way to ask a human."""

    def __init__(self, servers: Access = "public") -> None:
        self._servers: Access = servers

    def denied(self, host: Any) -> None: ...

    def standing(self, host: Any) -> None: ...

    def of_server(self, host: Any) -> Access:
        return self._servers

    def unlisted(self, host: Any) -> str:
        return Environment().refuses_server(*host)

    async def ask(self, host: tuple[str, int]) -> str:
        return f"this session may not reach {host[0]}:{host[1]}"


class Listed(Unasked):
    """The operator has listed every host for private addresses, too."""

    def standing(self, host: Any) -> Any:
        return "anywhere"

    async def used(self, host: Any) -> None: ...


def made(
    declared: Sequence[str],
    hosts: HostGate | None = None,
    resolve: Resolve = resolve,
    allows_address: Callable[[str], bool] = may_reach,
    closed: Sequence[str] = (),
) -> Egress:
    return Egress(declared, hosts or Unasked(), closed=closed, resolve=resolve, allows_address=allows_address)


class Site:
    """An ASGI application that records requests and returns their bodies."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        if scope["type"] != "http":
            return
        body = b""
        while (message := await receive()).get("more_body"):
            body += message.get("body", b"")
        body += message.get("body", b"")
        self.asked.append(f"{scope['method']} {scope['path']}")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"you said " + body})


@asynccontextmanager
async def proxied(egress: Egress) -> AsyncGenerator[str]:
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    listening.setblocking(False)
    await egress.serve(listening)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        await egress.close()


async def ask(proxy: str, url: str, content: bytes = b"hi") -> httpx.Response:
    # Nothing here is encrypted: `verify` would only read all authorities, 36 ms of a CPU for each request.
    async with httpx.AsyncClient(proxy=proxy, trust_env=False, verify=False) as http:
        return await http.post(url, content=content)


async def connect(proxy: str, target: str) -> bytes:
    """Sends CONNECT, and returns the first line of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.rpartition(":")[2]))
    writer.write(f"CONNECT {target} HTTP/1.1\r\nhost: {target}\r\n\r\n".encode())
    line = await reader.readline()
    writer.close()
    return line
