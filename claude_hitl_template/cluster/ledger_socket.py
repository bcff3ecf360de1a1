"""Calls of the ledger over a unix socket, for processes on its own machine.

A call through a Serve handle costs 2 ms of processor time and as much latency, whatever it does; over the socket a tenth
of that. A process on another machine, or in a container that does not see the data folder, uses the handle.

A call is one frame: a number, the caller's capability, and its pickled method and arguments. The capability is checked
before anything is unpickled. The answer has the same number. A frame without a capability cancels the call of its number.
"""

import asyncio
import itertools
import os
import pickle
import secrets
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import structlog

from claude_hitl_template.errors import InternalError, Unauthorized

log = structlog.get_logger()

MOST_BYTES = 64 * 1024**2  # of one call; a larger one goes through Ray's object store
RETRY_S = 30.0  # until a process that reached no socket looks again
_CALL = struct.Struct("!QHI")  # number, bytes of the capability, bytes of the rest
_ANSWER = struct.Struct("!QI")
_SUFFIX = ".sock"

type Answer = tuple[bool, Any]
type Answering = Callable[..., Awaitable[Answer]]


class SocketLost(ConnectionError):
    """The ledger closed the connection; whether it did what was asked is not known."""


class LedgerSocket:
    """The ledger's side.

    Args:
        call: Answers one call: `call(capability, method, *args, **kwargs)`. It raises nothing.
        check: Raises Unauthorized for what is no capability of this service.
    """

    def __init__(self, call: Answering, check: Callable[[str], object]) -> None:
        self._call, self._check = call, check
        self._server: asyncio.Server | None = None
        self.conversations = set[asyncio.Task[None]]()

    async def open(self, folder: Path) -> Path | None:
        """Listens in `folder`, which is closed to other users. Returns where; None if that is not possible."""
        # The random part: on another machine the same path never leads to another ledger.
        path = folder / f"{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"
        try:
            self._server = await asyncio.start_unix_server(self._accept, sock=_listening(path))
        except OSError as error:  # the path is too long, or the file system has no sockets
            log.warning("the ledger has no socket; it is called through Ray Serve only", why=str(error))
            return None
        return path

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conversation = asyncio.create_task(self._converse(reader, writer))
        self.conversations.add(conversation)
        conversation.add_done_callback(self.conversations.discard)
        conversation.add_done_callback(lambda _ended: writer.close())

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        running = dict[int, asyncio.Task[None]]()
        try:
            while True:
                number, capability_bytes, size = _CALL.unpack(await reader.readexactly(_CALL.size))
                if not capability_bytes:
                    if number in running:
                        running[number].cancel()
                    continue
                capability = (await reader.readexactly(capability_bytes)).decode("latin-1")
                self._check(capability)
                if size > MOST_BYTES:
                    return
                request = await reader.readexactly(size)
                task = asyncio.create_task(self._answer(writer, number, capability, request))
                running[number] = task
                task.add_done_callback(lambda _ended, number=number: running.pop(number, None))
        except (asyncio.IncompleteReadError, OSError):
            return  # the caller has gone
        except Unauthorized as error:
            log.warning("a connection to the ledger is closed", why=str(error))
        finally:
            for task in list(running.values()):
                task.cancel()

    async def _answer(
        self, writer: asyncio.StreamWriter, number: int, capability: str, request: bytes
    ) -> None:
        method = "a call"
        try:
            method, args, kwargs = pickle.loads(request)  # noqa: S301 - its sender has a capability
            answer = pickle.dumps(await self._call(capability, method, *args, **kwargs))
        except Exception as error:  # what cannot be pickled raises anything
            log.exception("the ledger failed", method=method)
            answer = pickle.dumps(
                (False, InternalError(f"{method} could not be sent ({type(error).__name__})"))
            )
        try:
            writer.write(_ANSWER.pack(number, len(answer)) + answer)
            await writer.drain()
        except OSError:
            writer.close()


def _listening(path: Path) -> socket.socket:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.parent.chmod(0o700)
    _remove_old(path.parent)
    made = socket.socket(socket.AF_UNIX)
    try:
        made.bind(str(path))
        path.chmod(0o600)
    except OSError:
        made.close()
        raise
    return made


def _remove_old(folder: Path) -> None:
    """Removes the sockets of ledgers that have ended."""
    for left in folder.glob(f"*{_SUFFIX}"):
        pid = left.stem.partition("-")[0]
        if not (pid.isdecimal() and psutil.pid_exists(int(pid))):
            left.unlink(missing_ok=True)


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
            self._writer.write(_CALL.pack(number, len(sender), len(request)) + sender + request)
            await self._writer.drain()
            return pickle.loads(await answer)  # noqa: S301 - the ledger's
        except asyncio.CancelledError:
            if answer.cancelled() or not answer.done():
                self._writer.write(_CALL.pack(number, 0, 0))
            raise
        except OSError as error:
            raise SocketLost(str(error)) from error
        finally:
            self._waiting.pop(number, None)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                number, size = _ANSWER.unpack(await reader.readexactly(_ANSWER.size))
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
