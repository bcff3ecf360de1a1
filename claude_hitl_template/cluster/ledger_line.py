"""A process's line to the ledger. It imports neither Ray Serve nor gRPC: over the ledger's socket it needs neither.

A call through a Serve handle costs 2 ms of processor time and as much latency, whatever it does; over the socket a tenth
of that. A process on another machine, or in a container that does not see the data folder, uses the handle.

A call is one frame: a number, the caller's capability, and its pickled method and arguments. The answer has the same
number. A frame without a capability cancels the call of its number.
"""

import asyncio
import contextlib
import itertools
import pickle
import struct
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import structlog

from claude_hitl_template.errors import StoreUnreachable
from claude_hitl_template.store.access import client, methods_of
from claude_hitl_template.store.protocol import Reachable, Store, own_key

log = structlog.get_logger()

APP_NAME = "claude-hitl"
LEDGER, SUPERVISOR = "Ledger", "Supervisor"  # names of deployments
AWAY_S = 75.0  # a restarted database server answers well within this
RETRY_S = 30.0  # until a process that reached no socket looks again
MOST_BYTES = 64 * 1024**2  # of one call over the socket; a larger one goes through Ray's object store
CALL = struct.Struct("!QHI")  # number, bytes of the capability, bytes of the rest
ANSWER = struct.Struct("!QI")
# The methods that take an idempotency key.
_KEYED = frozenset(
    name for name, method in methods_of(Store).items() if "idempotency_key" in signature(method).parameters
)
_BY_HANDLE = "claude_hitl_template.cluster.ledger_handle"  # its import takes half a second and 40 MB

type Answer = tuple[bool, Any]


class SocketLost(ConnectionError):
    """The ledger closed the connection; whether it did what was asked is not known."""


class Line:
    """This process's line to the ledger, for all its callers of one event loop.

    On the ledger's machine calls go over its socket. Elsewhere, until there is a connection, and when it was lost, they go
    through the Serve handle, and again while the ledger does not answer; writes are idempotent, so they may be repeated.

    Args:
        handle: The ledger's Serve handle; without one it is made when it is needed.
        socket: Where the ledger may be called on this machine, if that is known; else it is asked.
    """

    def __init__(self, handle: Any = None, *, socket: Path | None = None) -> None:
        self._handle = handle
        self._by_handle: Any = None
        self._importing = asyncio.Lock()
        self._route = Route(self._find, socket)

    @property
    def socket(self) -> Path | None:
        """Where the ledger is called on this machine; None if it is called through the handle."""
        return self._route.at

    async def reached(self) -> None:
        """Returns once the ledger can be called. Raises HitlError."""
        if not await self._route.is_open():
            await reach(Reachable, self).ping()

    async def send(
        self, capability: str | None, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if method in _KEYED and kwargs.get("idempotency_key") is None:
            kwargs["idempotency_key"] = own_key()  # the call may be repeated with this key
        answer = None
        connection = self._route.connection()
        if connection is not None and capability is not None:
            with contextlib.suppress(SocketLost):
                answer = await connection.call(capability, method, args, kwargs)
        if answer is None or (not answer[0] and isinstance(answer[1], StoreUnreachable)):
            answer = await (await self._through_handle()).send(capability, method, args, kwargs)
        ok, result = answer
        if not ok:
            raise result
        return result

    async def _find(self) -> Path | None:
        return await (await self._through_handle()).socket()

    async def _through_handle(self) -> Any:
        async with self._importing:
            if self._by_handle is None:
                module = await asyncio.to_thread(import_module, _BY_HANDLE)
                self._by_handle = module.HandleLine(self._handle)
        return self._by_handle


class Connection:
    """The caller's side. It is lost once, and then a new one must be opened."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self.is_lost = False
        self._reading = asyncio.create_task(self._read(reader))

    async def call(
        self, capability: str, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Answer | None:
        """None for a call that is too large. Raises SocketLost."""
        request, sender = pickle.dumps((method, args, kwargs)), capability.encode()
        if len(request) > MOST_BYTES:
            return None
        if self.is_lost:
            raise SocketLost("the ledger closed the connection")
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._writer.write(CALL.pack(number, len(sender), len(request)) + sender + request)
            await self._writer.drain()
            return pickle.loads(await answer)  # noqa: S301 - the ledger's
        except asyncio.CancelledError:
            if answer.cancelled() or not answer.done():
                self._writer.write(CALL.pack(number, 0, 0))
            raise
        except OSError as error:
            raise SocketLost(str(error)) from error
        finally:
            self._waiting.pop(number, None)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                number, size = ANSWER.unpack(await reader.readexactly(ANSWER.size))
                answer = await reader.readexactly(size)
                waiting = self._waiting.get(number)
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
        except (asyncio.IncompleteReadError, OSError):
            pass  # each call that waits raises it
        finally:
            self.is_lost = True
            self._writer.close()
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(SocketLost("the ledger closed the connection"))


class Route:
    """This process's connection to the ledger, in one event loop. It is opened in the background: a call never waits for
    it, but goes through the handle meanwhile.

    `find` asks the ledger for its socket; `known` is one that was asked for already.
    """

    def __init__(self, find: Callable[[], Awaitable[Path | None]], known: Path | None = None) -> None:
        self._find, self._known = find, known
        self._connection: Connection | None = None
        self._opening: asyncio.Task[None] | None = None
        self._not_before = 0.0  # time.monotonic()
        self._at: Path | None = None

    @property
    def at(self) -> Path | None:
        """Where it is connected to; None without a connection."""
        return self._at if self.connection() is not None else None

    def connection(self) -> Connection | None:
        found = self._connection
        if found is not None and not found.is_lost:
            return found
        if (self._opening is None or self._opening.done()) and time.monotonic() >= self._not_before:
            self._opening = asyncio.create_task(self._open())
        return None

    async def is_open(self) -> bool:
        """Whether there is a connection, once it is known."""
        if self.connection() is None and self._opening is not None:
            await asyncio.wait({self._opening})
        return self.connection() is not None

    async def _open(self) -> None:
        known, self._known = self._known, None
        if not (await self._connect(known) or await self._connect(await self._find())):
            self._not_before = time.monotonic() + RETRY_S

    async def _connect(self, path: Path | None) -> bool:
        if path is None:
            return False
        try:
            self._connection, self._at = Connection(*await asyncio.open_unix_connection(path)), path
        except OSError as error:
            log.debug("the ledger's socket was not reached", why=str(error))
            return False
        return True


def reach[P](protocol: type[P], line: Line, capability: str | None = None) -> P:
    """Returns a client of the ledger.

    Args:
        protocol: The methods that the client has.
        line: Where its calls are sent.
        capability: Permits the methods of `protocol`; without one, only `ping` is permitted.
    """
    return client(protocol, partial(line.send, capability))
