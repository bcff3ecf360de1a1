"""A TCP proxy between service and Postgres that can be slow or silent, reset connections, or lose the answer to a commit."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

CHUNK = 65536
COMMIT = b"COMMIT"
LOSE = "lose the answer to a commit"
RESET = "reset the database's connections"


class Line:
    """Forwards connections to `port` of loopback. `met` is called when a commit's answer was lost.

    Its methods may be called from any thread, and apply to all connections, existing and new.
    """

    def __init__(self, port: int, met: Callable[[str], None]) -> None:
        self._port, self._met = port, met
        self._slow_until = self._silent_until = 0.0
        self._delay_s = 0.0
        self._to_lose = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.get_running_loop()

    def slow(self, delay_s: float, for_s: float) -> None:
        """Delays each answer by `delay_s` for a while."""
        self._delay_s, self._slow_until = delay_s, time.monotonic() + for_s

    def silent(self, for_s: float) -> None:
        """Forwards nothing for a while, without closing connections."""
        self._silent_until = time.monotonic() + for_s

    def lose_answers(self, times: int) -> None:
        """Forwards the next commits to the server, but resets the connection instead of sending the answer. A second call
        does not add to the first."""
        self._to_lose = max(self._to_lose, times)

    def reset(self) -> int:
        """Resets all connections, and returns their number."""
        found = list(self._open)
        for writer in found:
            self._loop.call_soon_threadsafe(writer.transport.abort)
        return len(found) // 2

    def busy(self) -> bool:
        return max(self._slow_until, self._silent_until) > time.monotonic() or self._to_lose > 0

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forwards one connection until one of its ends closes it."""
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, server_writer}
        self._open |= ends
        losing = asyncio.Event()
        pumps = [
            asyncio.create_task(self._asked(reader, server_writer, losing)),
            asyncio.create_task(self._answered(server_reader, writer, losing)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._open -= ends
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for end in ends:
                end.transport.abort()
                end.close()

    async def _asked(
        self, reader: asyncio.StreamReader, server: asyncio.StreamWriter, losing: asyncio.Event
    ) -> None:
        while data := await reader.read(CHUNK):
            await self._wait_until_heard()
            if self._to_lose > 0 and COMMIT in data:
                self._to_lose -= 1
                losing.set()
            await _send(server, data)

    async def _answered(
        self, server: asyncio.StreamReader, writer: asyncio.StreamWriter, losing: asyncio.Event
    ) -> None:
        while data := await server.read(CHUNK):
            if losing.is_set():
                self._met(LOSE)
                return
            await self._wait_until_heard()
            if self._slow_until > time.monotonic():
                await asyncio.sleep(self._delay_s)
            await _send(writer, data)

    async def _wait_until_heard(self) -> None:
        while (left := self._silent_until - time.monotonic()) > 0:
            await asyncio.sleep(left)


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    with contextlib.suppress(ConnectionError):
        await writer.drain()


@asynccontextmanager
async def serving(port: int, met: Callable[[str], None]) -> AsyncGenerator[tuple[Line, int]]:
    """Yields a proxy for that port of loopback, and the port on which the proxy listens."""
    line = Line(port, met)
    server = await asyncio.start_server(line.carry, "127.0.0.1", 0)
    try:
        yield line, server.sockets[0].getsockname()[1]
    finally:
        server.close()
        line.reset()
