"""Notifications between ledgers through Postgres: changes and previews. A lost one only delays a poll.

It is sent after the commit, by a connection of its own, so that no commit waits for another one's notification.
"""

import asyncio
import contextlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import psycopg
import structlog
from pydantic import Field, TypeAdapter, ValidationError

from claude_hitl_template import fault_points
from claude_hitl_template.errors import HitlError
from claude_hitl_template.store.signals import Note

log = structlog.get_logger()
CHANNEL = "claude_hitl"
PAYLOAD_BYTES = 7_900  # Postgres takes less than 8,000
KEPT = 10_000  # notes that wait to be sent; a database that is away costs no more memory than this
AGAIN_S = 0.5
# Every ledger holds it shared, so that a restore, which wants it alone, does not pull the database away under one.
IN_USE = 0x636C61756465

# [mark, sender, notes]; what a note holds is looked at where it is used.
_MESSAGE: TypeAdapter[tuple[int, str, list[Note]]] = TypeAdapter(
    tuple[Annotated[int, Field(strict=True, gt=0)], str, list[Note]]
)

type Deliver = Callable[[int, bool, Sequence[Note]], None]


class Notifier:
    """`deliver(mark, own, notes)` gets the notes of all ledgers in one order; `mark` names the last message to all alike.

    Mark 0 without notes: something may have been missed.
    """

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self._parameters = dict(parameters)
        self._me = secrets.token_hex(4)
        self._pending: list[Note] = []
        self._more = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.deliver: Deliver = lambda _mark, _own, _notes: None
        self.connected = False

    def start(self) -> None:
        """Hears and sends from now on. Called with each transaction: what a defect ended goes on, and is logged."""
        for name, work in (("hear", self._hear), ("send", self._send)):
            task = self._tasks.get(name)
            if task is None or task.done():
                if task is not None and not task.cancelled():
                    log.error("the relay stopped, and goes on", task=name, exc_info=task.exception())
                self._tasks[name] = asyncio.create_task(work())

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def post(self, note: Note) -> None:
        if len(self._pending) < KEPT:
            self._pending.append(note)
        self._more.set()

    async def _connect(self) -> psycopg.AsyncConnection[Any]:
        return await psycopg.AsyncConnection.connect(**self._parameters, autocommit=True)

    async def _hear(self) -> None:
        while True:
            try:
                with contextlib.suppress(psycopg.Error, OSError):
                    async with await self._connect() as connection:
                        await connection.execute("select pg_try_advisory_lock_shared(%s)", (IN_USE,))
                        await connection.execute(f"listen {CHANNEL}")
                        self.connected = True
                        self.deliver(0, False, ())
                        async for notified in connection.notifies():
                            self._take(notified.payload)
            finally:
                self.connected = False
            await asyncio.sleep(AGAIN_S)

    def _take(self, payload: str) -> None:
        try:
            mark, sender, notes = _MESSAGE.validate_json(payload)
        except ValidationError as error:  # another program uses our channel
            log.warning("a notification is not ours", why=str(error.errors()[0]["msg"]))
            return
        self.deliver(mark, sender == self._me, notes)

    async def _send(self) -> None:
        while True:
            with contextlib.suppress(psycopg.Error, OSError, HitlError):
                async with await self._connect() as connection:
                    while True:
                        await self._more.wait()
                        self._more.clear()
                        pending, self._pending = self._pending, []
                        for notes in packed(pending):
                            message = f'[{secrets.randbits(52) + 1},"{self._me}",[{",".join(notes)}]]'
                            await fault_points.reach("notify.before")
                            await connection.execute("select pg_notify(%s, %s)", (CHANNEL, message))
                            await fault_points.reach("notify.after")
            await asyncio.sleep(AGAIN_S)


def packed(notes: Sequence[Note]) -> list[list[str]]:
    """The notes as JSON, in messages that Postgres takes. One that fits in none is left out."""
    messages: list[list[str]] = []
    room = 0
    for text in dict.fromkeys(json.dumps(note, separators=(",", ":")) for note in notes):
        if len(text) > PAYLOAD_BYTES - 40:  # ASCII: as many bytes as characters
            continue
        if len(text) + 1 > room:
            messages.append([])
            room = PAYLOAD_BYTES - 40
        messages[-1].append(text)
        room -= len(text) + 1
    return messages
