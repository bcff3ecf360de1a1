"""The proxy in front of the database forwards data; on request it is slow or silent, resets connections or loses answers."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from tests.chaos.tcp_proxy import LOSE, Line, serving

type Ends = tuple[Line, int, list[bytes]]


@pytest.fixture
def met() -> list[str]:
    return []


@pytest.fixture
async def ends(met: list[str]) -> AsyncIterator[Ends]:
    """Yields a proxy in front of an echo server, its port, and the data that the server received."""
    heard: list[bytes] = []

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            heard.append(data)
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with serving(server.sockets[0].getsockname()[1], met.append) as (line, port):
        yield line, port, heard
    server.close()


async def ask(port: int, what: bytes) -> bytes:
    """Sends data and returns the answer; b"" if the connection is reset without one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(what)
    try:
        return await reader.read(100)
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_what_is_said_goes_through(ends: Ends, met: list[str]):
    assert await ask(ends[1], b"COMMIT") == b"COMMIT"
    assert met == []


async def test_a_commit_is_done_and_its_answer_is_lost(ends: Ends, met: list[str]):
    line, port, heard = ends
    line.lose_answers(1)
    assert await ask(port, b"select 1") == b"select 1"
    assert line.busy()
    assert await ask(port, b"COMMIT") == b""
    assert heard == [b"select 1", b"COMMIT"]
    assert met == [LOSE]
    assert not line.busy()
    assert await ask(port, b"COMMIT") == b"COMMIT"


async def test_a_slow_or_silent_line_answers_later(ends: Ends):
    line, port, _ = ends
    for strike in (lambda: line.slow(0.3, 10), lambda: line.silent(0.3)):
        strike()
        began = time.monotonic()
        assert await ask(port, b"hello") == b"hello"
        assert time.monotonic() - began >= 0.3


async def test_all_connections_break_off_at_once(ends: Ends):
    line, port, _ = ends
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
    for reader, writer in connections:
        writer.write(b"x")
        assert await reader.read(1) == b"x"
    assert line.reset() == 3
    for reader, writer in connections:
        with contextlib.suppress(ConnectionError):
            assert await reader.read(1) == b""
        writer.close()
