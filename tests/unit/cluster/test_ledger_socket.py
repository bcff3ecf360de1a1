"""Calls of the ledger over its socket: who may call, what a lost or cancelled call does, and when the handle is used."""

import asyncio
import pickle
import struct
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from claude_hitl_template.config.secret_files import SigningKey
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.errors import NotFound
from claude_hitl_template.store.access import Authority
from claude_hitl_template.store.protocol import Clients

with warnings.catch_warnings(
    action="ignore", category=DeprecationWarning
):  # Ray Serve's own, as it is imported
    import claude_hitl_template.cluster.ledger_handle  # noqa: F401 - a line imports it in the end
    from claude_hitl_template.cluster import ledger_line
    from claude_hitl_template.cluster.ledger_line import Connection, Line, SocketLost, reach
    from claude_hitl_template.cluster.ledger_socket import LedgerSocket

AUTHORITY = Authority(SigningKey(b"k" * 32))
OURS = AUTHORITY.ingress()

type Call = tuple[str, tuple[Any, ...], dict[str, Any]]


class Ledger:
    """Answers calls over the socket, and over a Serve handle; records those that came over each."""

    def __init__(self, folder: Path) -> None:
        self._server = LedgerSocket(self._call, AUTHORITY.check)
        self._folder = folder
        self.path: Path | None = None
        self.by_socket: list[Call] = []
        self.by_handle: list[Call] = []
        self.cancelled = 0
        self.line = Line(self)
        self.answers: Callable[[], Any] = lambda: 7
        self.holds = asyncio.Event()
        self.holds.set()

    async def open(self) -> Path | None:
        self.path = await self._server.open(self._folder)
        return self.path

    async def end_conversations(self) -> None:
        """As a ledger that is killed."""
        for conversation in list(self._server.conversations):
            conversation.cancel()
        await asyncio.sleep(0.01)

    async def close(self) -> None:
        listening = self._server._server  # pyright: ignore[reportPrivateUsage]
        if listening is not None:
            listening.close()
        await self.end_conversations()

    async def _call(self, _capability: str, method: str, *args: Any, **kwargs: Any) -> tuple[bool, Any]:
        self.by_socket.append((method, args, kwargs))
        try:
            await self.holds.wait()
            return True, self.answers()
        except NotFound as error:
            return False, error
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    # -- the Serve handle

    def options(self, **_options: Any) -> "Ledger":
        return self

    @property
    def call(self) -> "Remote":
        async def call(_capability: str, method: str, *args: Any, **kwargs: Any) -> tuple[bool, Any]:
            self.by_handle.append((method, args, kwargs))
            return True, 8

        return Remote(call)

    @property
    def socket(self) -> "Remote":
        async def path() -> Path | None:
            return self.path

        return Remote(path)


class Remote:
    def __init__(self, remote: Callable[..., Any]) -> None:
        self.remote = remote


@pytest.fixture
async def ledger(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Ledger]:
    made = Ledger(Path(tmp_path_factory.mktemp("l", numbered=True)))
    assert await made.open() is not None
    yield made
    await made.close()


async def last_seq(ledger: Ledger, capability: str = OURS) -> int:
    return await reach(Clients, ledger.line, capability).last_seq("s", None)


async def connected(ledger: Ledger) -> None:
    """The first call uses the handle, and opens the connection."""
    async with asyncio.timeout(5):
        while not ledger.by_socket:
            await last_seq(ledger)
            await asyncio.sleep(0.01)
    ledger.by_handle.clear()
    ledger.by_socket.clear()


@asynccontextmanager
async def connection(ledger: Ledger) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    assert ledger.path is not None
    reader, writer = await asyncio.open_unix_connection(ledger.path)
    yield reader, writer
    writer.close()


async def test_calls_go_over_the_socket_once_there_is_a_connection(ledger: Ledger) -> None:
    await connected(ledger)
    assert await last_seq(ledger) == 7
    assert ledger.by_socket == [("last_seq", ("s", None), {})]
    assert not ledger.by_handle


async def test_a_socket_that_is_known_needs_no_handle(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_line, "_BY_HANDLE", "no.such.module")
    line = Line(socket=ledger.path)
    await line.reached()
    assert await reach(Clients, line, OURS).last_seq("s", None) == 7
    assert line.socket == ledger.path


async def test_a_known_socket_that_leads_nowhere_is_asked_for_anew(ledger: Ledger, tmp_path: Path) -> None:
    line = Line(ledger, socket=tmp_path / "gone.sock")
    await line.reached()
    assert line.socket == ledger.path


async def test_an_error_of_ours_comes_back_as_what_it_is(ledger: Ledger) -> None:
    await connected(ledger)

    def fail() -> Any:
        raise NotFound("no session")

    ledger.answers = fail
    with pytest.raises(NotFound, match="no session"):
        await last_seq(ledger)


async def test_many_calls_share_the_connection_and_each_gets_its_own_answer(ledger: Ledger) -> None:
    await connected(ledger)
    numbers = iter(range(100))
    ledger.answers = lambda: next(numbers)
    assert sorted(await asyncio.gather(*(last_seq(ledger) for _ in range(100)))) == list(range(100))


class Trap:
    """Does something as soon as it is unpickled."""

    sprung = False

    def __reduce__(self) -> Any:
        return (setattr, (Trap, "sprung", True))


@pytest.mark.parametrize("capability", ["", "x", OURS[:-1] + ("0" if OURS[-1] != "0" else "1")])
async def test_nothing_is_unpickled_for_a_caller_without_a_capability(
    ledger: Ledger, capability: str
) -> None:
    Trap.sprung = False
    body, sender = pickle.dumps(("ping", Trap(), {})), capability.encode()
    async with connection(ledger) as (reader, writer):
        writer.write(struct.pack("!QHI", 1, len(sender), len(body)) + sender + body)
        assert not capability or await reader.read() == b""
    assert not Trap.sprung
    assert not ledger.by_socket


async def test_a_capability_of_another_key_is_refused_with_an_error(ledger: Ledger) -> None:
    await connected(ledger)
    stranger = Authority(SigningKey(b"x" * 32)).ingress()
    assert await last_seq(ledger, stranger) == 8  # the handle's ledger checks it, too; this one does not
    assert not ledger.by_socket


async def test_a_cancelled_call_is_cancelled_in_the_ledger(ledger: Ledger) -> None:
    await connected(ledger)
    ledger.holds.clear()
    asking = asyncio.create_task(last_seq(ledger))
    async with asyncio.timeout(5):
        while not ledger.by_socket:
            await asyncio.sleep(0.01)
        asking.cancel()
        while not ledger.cancelled:
            await asyncio.sleep(0.01)
    ledger.holds.set()
    assert await last_seq(ledger) == 7


async def test_a_write_whose_answer_was_lost_is_repeated_by_the_handle_with_its_key(ledger: Ledger) -> None:
    await connected(ledger)
    ledger.holds.clear()
    sending = asyncio.create_task(
        reach(Clients, ledger.line, OURS).send_events("s", None, [], by=Actor(name="a"))
    )
    async with asyncio.timeout(5):
        while not ledger.by_socket:
            await asyncio.sleep(0.01)
        await ledger.end_conversations()
        await sending
    (_, _, first), (_, _, second) = ledger.by_socket[0], ledger.by_handle[0]
    assert first["idempotency_key"] == second["idempotency_key"]


async def test_a_call_that_is_too_large_uses_the_handle(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    await connected(ledger)
    monkeypatch.setattr(ledger_line, "MOST_BYTES", 1000)
    assert await reach(Clients, ledger.line, OURS).last_seq("s" * 1000, None) == 8
    assert not ledger.by_socket


async def test_without_a_socket_every_call_uses_the_handle(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / ("long" * 30))
    assert await ledger.open() is None
    assert [await last_seq(ledger) for _ in range(3)] == [8, 8, 8]


async def test_calls_on_a_lost_connection_fail_at_once(ledger: Ledger) -> None:
    assert ledger.path is not None
    made = Connection(*await asyncio.open_unix_connection(ledger.path))
    assert await made.call(OURS, "last_seq", ("s", None), {}) == (True, 7)
    await ledger.end_conversations()
    async with asyncio.timeout(5):
        while not made.is_lost:
            await asyncio.sleep(0.01)
    with pytest.raises(SocketLost):
        await made.call(OURS, "last_seq", ("s", None), {})
