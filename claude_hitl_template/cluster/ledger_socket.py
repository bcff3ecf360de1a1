"""The ledger's socket, for processes on its own machine. The format of calls is in ledger_line.py.

The capability of a call is checked before anything is unpickled.
"""

import asyncio
import pickle
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from claude_hitl_template.cluster.ledger_line import ANSWER, CALL, MOST_BYTES, Answer
from claude_hitl_template.cluster.local_sockets import listening
from claude_hitl_template.errors import InternalError, Unauthorized

log = structlog.get_logger()

type Answering = Callable[..., Awaitable[Answer]]


class LedgerSocket:
    """The ledger's side.

    Args:
        call: Answers one call: `call(capability, method, *args, **kwargs)`. It raises nothing.
        check: Raises Unauthorized for a capability that this service did not make.
    """

    def __init__(self, call: Answering, check: Callable[[str], object]) -> None:
        self._call, self._check = call, check
        self._server: asyncio.Server | None = None
        self.conversations = set[asyncio.Task[None]]()

    async def open(self, folder: Path) -> Path | None:
        """Listens in `folder`, which is closed to other users. Returns where; None if that is not possible."""
        try:
            bound = listening(folder)
            self._server = await asyncio.start_unix_server(self._accept, sock=bound)
        except OSError as error:
            log.warning("the ledger has no socket; it is called through Ray Serve only", why=str(error))
            return None
        return Path(bound.getsockname())

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conversation = asyncio.create_task(self._converse(reader, writer))
        self.conversations.add(conversation)
        conversation.add_done_callback(self.conversations.discard)
        conversation.add_done_callback(lambda _ended: writer.close())

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        running = dict[int, asyncio.Task[None]]()
        try:
            while True:
                number, capability_bytes, size = CALL.unpack(await reader.readexactly(CALL.size))
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
            writer.write(ANSWER.pack(number, len(answer)) + answer)
            await writer.drain()
        except OSError:
            writer.close()
