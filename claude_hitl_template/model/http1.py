"""One HTTP/1.1 connection of a client inside a sandbox, parsed by h11: it reads requests and sends answers as streams."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from typing import Any

import h11

READ_BYTES = 64 * 1024
MAX_CONNECTIONS = 64
_HOP_BY_HOP = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade",
}  # fmt: skip

Headers = list[tuple[str, str]]


class ClientGone(Exception):
    """The client closed its connection, or sent something other than HTTP."""


class ClientConnection:
    """The server's side of one connection. Raises ClientGone from any method."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=64 * 1024)

    async def request(self) -> h11.Request | None:
        """The next request, without its body; None when the client has no more."""
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        if self._http.our_state is not h11.IDLE:
            return None
        event = await self._event()
        return event if isinstance(event, h11.Request) else None

    async def body(self) -> AsyncIterator[bytes]:
        """The request's body; an error if its length differs from the declared one."""
        while isinstance(event := await self._event(), h11.Data):
            yield bytes(event.data)

    async def start(self, status: int, headers: Iterable[tuple[str, str]], reason: str = "") -> None:
        """The answer's status and headers; its body follows by `send`, then `end`."""
        kept = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        await self._send(h11.Response(status_code=status, headers=kept, reason=reason.encode("latin-1")))

    async def send(self, data: bytes) -> None:
        """Returns when the client has room for more."""
        await self._send(h11.Data(data=data))

    async def end(self) -> None:
        await self._send(h11.EndOfMessage())

    async def answer(self, status: int, content_type: str, body: bytes, reason: str = "") -> None:
        """Sends a whole answer and closes the connection; the rest of the request is not read."""
        headers = [
            ("content-type", content_type),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        await self.start(status, headers, reason)
        await self.send(body)
        await self.end()

    async def gone(self) -> None:
        """Returns when the client closes the connection. Only while nothing of a request is read.

        What comes meanwhile is kept for the next request; when that is much, the client waits.
        """
        while len(self._http.trailing_data[0]) < READ_BYTES:
            try:
                data = await self._reader.read(READ_BYTES)
            except OSError:
                return
            if not data:
                return
            self._http.receive_data(data)
        await asyncio.Event().wait()

    def take_over(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
        """The connection as it is after a CONNECT, with what was read of it and not used."""
        return self._reader, self._writer, self._http.trailing_data[0]

    async def _event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                if self._http.they_are_waiting_for_100_continue:
                    await self._send(h11.InformationalResponse(status_code=100, headers=[]))
                self._http.receive_data(await self._reader.read(READ_BYTES))
        except (h11.RemoteProtocolError, OSError) as error:
            raise ClientGone(str(error)) from error
        if isinstance(event, h11.ConnectionClosed):
            raise ClientGone("closed")
        return event

    async def _send(self, event: h11.Event) -> None:
        try:
            data = self._http.send(event)
            if data:
                self._writer.write(data)
                await self._writer.drain()
        except (h11.LocalProtocolError, OSError) as error:
            raise ClientGone(str(error)) from error


class Connections:
    """The connections of one listening socket, until `close`. Each is answered by `converse`, and then closed."""

    def __init__(self, converse: Callable[[ClientConnection], Awaitable[None]]) -> None:
        self._converse = converse
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._closed = False

    def serve(self, server: asyncio.Server) -> None:
        """`server` was started with `accept`."""
        self._server = server

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - asyncio runs this callback as a task
        self._tasks.add(task)
        try:
            if not self._closed and len(self._tasks) <= MAX_CONNECTIONS:
                with contextlib.suppress(ClientGone):
                    await self._converse(ClientConnection(reader, writer))
        finally:
            self._tasks.discard(task)
            writer.close()

    async def close(self) -> None:
        self._closed = True  # also for what was accepted and has no task yet
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def while_there(client: ClientConnection, answering: Coroutine[Any, Any, None]) -> None:
    """Runs until the answer is complete. Raises ClientGone if the client disconnects earlier."""
    task = asyncio.create_task(answering)
    leaving = asyncio.create_task(client.gone())
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("closed")
        task.result()
    finally:
        for one in (task, leaving):
            one.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


def end_to_end(headers: Iterable[tuple[str, str]]) -> Headers:
    """Headers without hop-by-hop ones, including those that `connection` names. Names are in lower case."""
    given = [(name.lower(), value) for name, value in headers]
    named = {one.strip().lower() for name, value in given if name == "connection" for one in value.split(",")}
    return [(name, value) for name, value in given if name not in _HOP_BY_HOP | named]


def text_headers(request: h11.Request) -> Headers:
    return [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in request.headers]


def one_length(headers: Headers) -> bool:
    """Whether the body's length is declared exactly once, in one way."""
    return sum(name == "content-length" for name, _ in headers) == 1 and not any(
        name == "transfer-encoding" for name, _ in headers
    )
