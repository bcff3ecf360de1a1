"""The proxy on a sandbox's loopback interface, served by the session's owner: the only way out except the model's socket.

It permits the servers in the agent's `mcp_servers`, at private addresses only those that the environment lists; the host of
an allowed WebFetch call while it runs; and the hosts that the environment, a rule or a human allows (`session/hosts.py`).
Everything else is refused with a reason that the agent can read. Names are resolved here, once for each connection, so that
no answer of a name server can lead elsewhere after it was checked; and only for hosts that may be reached: a lookup
discloses the name.
"""

import asyncio
import contextlib
import json
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from urllib.parse import urlsplit

import h11
import structlog

from claude_hitl_template.claude.injection import Injector
from claude_hitl_template.config.addresses import (
    PORTS,
    Resolve,
    host_of,
    is_address,
    is_own,
    is_private,
    may_reach,
    plain,
    resolve,
)
from claude_hitl_template.domain.canonical_json import shown_host
from claude_hitl_template.model.http1 import (
    READ_BYTES,
    ClientConnection,
    ClientGone,
    Connections,
    Headers,
    end_to_end,
    text_headers,
    while_there,
)
from claude_hitl_template.session.hosts import MAY_NOT, Access, Host, HostGate

log = structlog.get_logger()

CONNECT_S = 10.0

REFUSALS_TOLD = 20
_TARGET = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+):[0-9]+")
PRIVATE = "{name} is an address of this machine or of a private network, which no session may reach"


class Refused(Exception):
    """A refused request: the status and the message for the client."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(status, text)
        self.status, self.text = status, text


def _hosts_of(urls: Iterable[str]) -> set[Host]:
    return {host for url in urls if (host := host_of(url)) is not None}


class Egress:
    """The proxy of one sandbox, until `close`.

    The hosts of the URLs in `declared`, the agent's MCP servers, are permitted at public addresses, and wherever they are
    if the environment lists them as private hosts. Those in `closed`, the service's own, are never permitted; a port at one
    of its addresses is closed at all of them.
    """

    def __init__(
        self,
        declared: Iterable[str],
        hosts: HostGate | None,
        injector: Injector | None = None,
        *,
        closed: Iterable[str] = (),
        resolve: Resolve = resolve,
        allows_address: Callable[[str], bool] = may_reach,
    ) -> None:
        self._declared, self._closed = _hosts_of(declared), _hosts_of(closed)
        self._own_ports = {port for name, port in self._closed if is_address(name)}
        self._gate = hosts
        self._injector = injector or Injector((), Path())
        self._opened: dict[str, set[Host]] = {}
        self._refusals: dict[str, None] = {}
        self._unreached: dict[Host, str] = {}
        self._resolve, self._allows_address = resolve, allows_address
        self._connections = Connections(self._converse)

    def bind(self, hosts: HostGate) -> None:
        """Sets what decides; until then, every request is refused."""
        self._gate = hosts

    @property
    def _hosts(self) -> HostGate:
        if self._gate is None:
            raise Refused(403, "no session has been assigned yet")
        return self._gate

    async def serve(self, listening: socket.socket) -> None:
        self._connections.serve(await asyncio.start_server(self._connections.accept, sock=listening))

    def open(self, call_id: str, url: str) -> None:
        """Opens the host of an allowed WebFetch call until `shut`. WebFetch uses https even for an http URL."""
        host = host_of(url)
        if host is not None:
            self._opened[call_id] = {host, (host[0], PORTS["https"])}

    def shut(self, call_id: str) -> None:
        """Closes the host of a call that has its result."""
        self._opened.pop(call_id, None)

    def refusals(self) -> list[str]:
        """The refusals since the last call, with reasons: programs show little of a proxy's answer."""
        found, self._refusals = list(self._refusals), {}
        return found

    def why_unreached(self, url: str) -> str | None:
        """Why the last connection to a declared host failed here; None if it did not."""
        host = host_of(url)
        return self._unreached.get(host) if host else None

    async def close(self) -> None:
        await self._connections.close()

    async def _converse(self, client: ClientConnection) -> None:
        with contextlib.suppress(OSError):  # of the server's side
            await self._pass_on(client)

    async def _pass_on(self, client: ClientConnection) -> None:
        while (request := await client.request()) is not None:
            try:
                if request.method == b"CONNECT":
                    await self._tunnel(client, request)
                    return
                await self._forward(client, request)
            except Refused as refused:
                await self._refuse(client, refused, request.target.decode("latin-1")[:200])
                return

    async def _refuse(self, client: ClientConnection, refused: Refused, target: str) -> None:
        # A command may ask as often as it likes; the log is on the service's disk.
        if refused.text not in self._refusals and len(self._refusals) < REFUSALS_TOLD:
            log.info("egress refused", target=target, why=refused.text)
            self._refusals[refused.text] = None
        text = json.dumps({"error": refused.text}).encode()
        # Of the answer to a CONNECT, programs show the first line at most.
        reason = refused.text if refused.text.isascii() and refused.text.isprintable() else ""
        await client.answer(refused.status, "application/json", text, reason)

    async def _tunnel(self, client: ClientConnection, request: h11.Request) -> None:
        target = request.target.decode("latin-1")
        host = host_of(f"https://{target}") if _TARGET.fullmatch(target) else None
        if host is None:
            raise Refused(400, "CONNECT names a host and a port")
        if self._injector.is_for(*host):
            await self._intercept(client, host)
            return
        reader, writer = await self._reach(host)
        try:
            await client.start(200, [])
            own_reader, own_writer, early = client.take_over()
            writer.write(early)
            await _both_ways((own_reader, writer), (reader, own_writer))
        finally:
            writer.close()

    async def _intercept(self, client: ClientConnection, host: Host) -> None:
        """Terminates the client's TLS here, to add credentials outside of the sandbox."""
        name = host[0]
        (await self._reach(host))[1].close()  # before the client gets its 200
        context = await asyncio.to_thread(self._injector.context, name)
        await client.start(200, [])
        reader, writer, early = client.take_over()
        if early:
            return  # sent before the answer: it cannot be given back to TLS
        await writer.start_tls(context)
        inner = ClientConnection(reader, writer)
        while (request := await inner.request()) is not None:
            target = request.target.decode("latin-1")
            try:
                if not target.startswith("/"):  # the URL of another host
                    await self._refuse(inner, Refused(400, "a request here begins with its path"), name)
                    return
                await self._exchange_with(inner, request, f"https://{shown_host(*host)}{target}", host)
            except Refused as refused:
                await self._refuse(inner, refused, name)
                return

    async def _forward(self, client: ClientConnection, request: h11.Request) -> None:
        url = request.target.decode("latin-1")
        host = host_of(url) if url.isascii() and "\\" not in url else None
        if host is None or not url.startswith("http:"):
            raise Refused(
                400,
                "this is a proxy: it takes CONNECT, and requests for http:// URLs of a host that is clear",
            )
        await self._exchange_with(client, request, url, host)

    async def _exchange_with(
        self, client: ClientConnection, request: h11.Request, url: str, host: Host
    ) -> None:
        """One request to a server, on a connection of its own, and its answer; with TLS where the URL says so."""
        reader, writer = await self._reach(host)
        try:
            if url.startswith("https:"):
                await _secure(writer, host[0])
            await _exchange(client, self._outgoing(request, url, host), reader, writer)
        finally:
            writer.close()

    def _outgoing(self, request: h11.Request, url: str, host: Host) -> h11.Request:
        """The request as it is sent to the server."""
        found, given = urlsplit(url), text_headers(request)
        target = (found.path or "/") + (f"?{found.query}" if found.query else "")
        method = request.method.decode("latin-1")
        headers = [(n, v) for n, v in end_to_end(given) if n != "host"]
        headers = self._injector.headers(host, method, target, headers, tls=found.scheme == "https")
        headers = [("host", found.netloc.rpartition("@")[2]), *headers, ("connection", "close")]
        if any(n == "transfer-encoding" for n, _ in given):
            # With a length in addition, servers differ on where the request ends.
            headers = [(n, v) for n, v in headers if n != "content-length"]
            headers.append(("transfer-encoding", "chunked"))
        return h11.Request(method=request.method, target=target, headers=_raw(headers))

    async def _reach(self, host: Host) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to a host that may be reached. Raises Refused."""
        try:
            reached = await self._connection(host)
        except Refused as refused:
            if host in self._declared:
                self._unreached[host] = refused.text
            raise
        self._unreached.pop(host, None)
        return reached

    async def _connection(self, host: Host) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        name, port = host
        access = await self._access(host)
        try:
            addresses = [name] if is_address(name) else await self._resolve(name, port)
        except OSError as error:
            raise Refused(502, f"{name} is not known here ({error.strerror})") from error
        allowed = [address for address in addresses if self._allows(access, address, port)]
        if not allowed:
            listable = access == "public" and not any(self._is_closed(one, port) for one in addresses)
            unlisted = self._hosts.unlisted(host) if listable and host in self._declared else None
            raise Refused(403, unlisted or PRIVATE.format(name=name))
        return await _connect(name, allowed, port)

    def _allows(self, access: Access, address: str, port: int) -> bool:
        """Whether a host that has this access may be reached at one of its addresses."""
        return not self._is_closed(address, port) and (access == "anywhere" or self._allows_address(address))

    def _is_closed(self, address: str, port: int) -> bool:
        """Whether it is a port of the service itself."""
        reached = plain(address)
        return (reached, port) in self._closed or (port in self._own_ports and is_own(reached))

    async def _access(self, host: Host) -> Access:
        """Raises Refused, also when a human was asked just now."""
        if host in self._closed:
            raise Refused(
                403, MAY_NOT.format(where=shown_host(*host), why="it is this service's own address")
            )
        if denied := self._hosts.denied(host):
            raise Refused(403, denied)
        if host in self._declared:
            return self._hosts.of_server(host)
        if any(host in hosts for hosts in self._opened.values()):
            return "public"
        if standing := self._hosts.standing(host):
            await self._hosts.used(host)
            return standing
        if is_private(host[0], self._allows_address):  # an approval could not open it
            raise Refused(403, MAY_NOT.format(where=host[0], why=PRIVATE.format(name=host[0])))
        if refusal := await self._hosts.ask(host):
            raise Refused(403, refusal)
        return "public"


async def _connect(
    name: str, addresses: list[str], port: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    why = ""
    for address in addresses:
        try:
            return await asyncio.wait_for(asyncio.open_connection(address, port), CONNECT_S)
        except (TimeoutError, OSError) as error:
            why = str(error) or type(error).__name__
    raise Refused(502, f"{name}:{port} cannot be reached: {why}")


async def _secure(writer: asyncio.StreamWriter, name: str) -> None:
    try:
        context = await asyncio.to_thread(ssl.create_default_context)
        await asyncio.wait_for(writer.start_tls(context, server_hostname=name), CONNECT_S)
    except (TimeoutError, ssl.SSLError) as error:
        raise Refused(502, f"{name} cannot be trusted: {error}") from error


async def _exchange(
    client: ClientConnection,
    outgoing: h11.Request,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    server = h11.Connection(h11.CLIENT)
    writer.write(_sent(server, outgoing))
    async for data in client.body():
        writer.write(_sent(server, h11.Data(data=data)))
        await writer.drain()
    writer.write(_sent(server, h11.EndOfMessage()))
    await writer.drain()
    await while_there(client, _answer(client, server, reader))


async def _answer(client: ClientConnection, server: h11.Connection, reader: asyncio.StreamReader) -> None:
    async for event in _events(server, reader):
        if isinstance(event, h11.Response):
            headers = [(n.decode("latin-1"), v.decode("latin-1")) for n, v in event.headers]
            await client.start(event.status_code, end_to_end(headers))
        elif isinstance(event, h11.Data):
            await client.send(bytes(event.data))
        elif isinstance(event, h11.EndOfMessage):
            await client.end()
            return
    raise ClientGone("the server broke off")


async def _events(server: h11.Connection, reader: asyncio.StreamReader) -> AsyncIterator[object]:
    while True:
        try:
            while (event := server.next_event()) is h11.NEED_DATA:
                server.receive_data(await reader.read(READ_BYTES))
        except h11.RemoteProtocolError as error:
            raise ClientGone(f"the server does not speak HTTP: {error}") from error
        if isinstance(event, h11.ConnectionClosed):
            return
        yield event


async def _both_ways(*ways: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
    async def one_way(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(READ_BYTES):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()

    async with asyncio.TaskGroup() as tasks:
        for way in ways:
            tasks.create_task(_quietly(one_way(*way)))


async def _quietly(copying: Awaitable[None]) -> None:
    """Ignores the error of a broken connection: it is a normal end."""
    with contextlib.suppress(OSError):
        await copying


def _sent(server: h11.Connection, event: h11.Event) -> bytes:
    try:
        return server.send(event) or b""
    except h11.LocalProtocolError as error:
        raise ClientGone(str(error)) from error


def _raw(headers: Headers) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
