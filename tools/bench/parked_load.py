"""Thousands of parked sessions, made by the store's own rules without a CLI, and what one of them costs in rows."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import batched
from typing import Any

from pydantic import BaseModel

from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain import events
from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.events import UserMessage
from claude_hitl_template.domain.models import Agent, Environment, Usage
from claude_hitl_template.store.backend import Tx
from claude_hitl_template.store.connect import open_backend
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.filters import TimeRange
from claude_hitl_template.store.owners import LEASE_S
from claude_hitl_template.store.postgres import PostgresBackend
from claude_hitl_template.store.protocol import Call
from claude_hitl_template.store.sqlite import SqliteBackend
from claude_hitl_template.testing.memory_backend import MemoryBackend

CALLS = 2  # one is decided, the other goes on waiting, so that no decision wakes an owner
BATCH = 100  # sessions that are written in one transaction
DATABASE_S = 30.0


@dataclass(frozen=True)
class Waiting:
    """A parked session, and the event ids of its pending calls."""

    session_id: str
    event_ids: tuple[str, ...]


@dataclass(frozen=True)
class Footprint:
    """What the database holds of one session; bytes are those of its records as JSON."""

    rows: int
    record_bytes: int


@asynccontextmanager
async def opened(settings: Settings) -> AsyncGenerator[SqliteBackend | PostgresBackend]:
    """The database of a service that does not run. Raises ConfigError."""
    backend = await asyncio.to_thread(open_backend, settings, patience_s=DATABASE_S)
    try:
        yield backend
    finally:
        await backend.close()


async def make_parked_load(settings: Settings, key_hash: str, count: int) -> list[Waiting]:
    """`count` parked sessions of the key with this hash, each with CALLS pending approvals."""
    parked_sessions: list[Waiting] = []
    async with opened(settings) as backend:
        key = await CoreStore(backend).add_key("first key", key_hash)
        for numbers in batched(range(count), BATCH):
            async with backend.begin(write=True) as tx:
                parked_sessions += [await _make(tx, key.id, number) for number in numbers]
    return parked_sessions


async def _make(tx: Tx, key_id: str, number: int) -> Waiting:
    """A parked session: the rules run in memory, and the result is written at once."""
    memory = MemoryBackend()
    waiting = await _park(CoreStore(memory), key_id, number)
    async with memory.begin(write=False) as made:
        session = await made.session(waiting.session_id)
        log = await made.events(
            waiting.session_id, after=None, limit=1000, order="asc", types=(), created=TimeRange()
        )
        asked = await made.open_approvals(waiting.session_id)
    if session is None:
        raise AssertionError("it was just made")
    await tx.put_session(session)
    await tx.add_events(session.id, log)
    for approval in asked:
        await tx.put_approval(approval)
    return waiting


async def footprint(settings: Settings, key_hash: str, session_id: str) -> Footprint:
    async with opened(settings) as backend:
        store = CoreStore(backend)
        key = await store.add_key("first key", key_hash)
        session = await store.get_session(session_id, key.id)
        log = await store.list_events(session_id, key.id, limit=1000)
        asked = await store.list_approvals(key.id, limit=1000, session_id=session_id)
        transcript = await store.load_transcript(
            {"scope": session_id, "project_key": "-", "session_id": session.transcript_id, "subpath": ""}
        )
    records: list[BaseModel | dict[str, Any]] = [session, *log.data, *asked.data, *(transcript or ())]
    return Footprint(len(records), sum(len(_json(record)) for record in records))


async def _park(store: CoreStore, key_id: str, number: int) -> Waiting:
    said = UserMessage.model_validate(
        {"type": "user.message", "content": [{"type": "text", "text": f"Task {number}"}]}
    )
    session = await store.create_session(
        key_id, agent=Agent(), environment=Environment(), title=f"Task {number}", metadata={}, initial=[said]
    )
    epoch = (await store.acquire(session.id, "benchmark", lease_s=LEASE_S)).epoch
    snapshot = await store.snapshot(session.id, epoch)
    await store.begin_turn(session.id, epoch, snapshot.queued[0].id)
    calls = [_call(f"toolu_{session.id}_{index}", index) for index in range(CALLS)]
    drafts = [events.tool_use(c.call_id, c.tool_name, c.input, c.verdict, None) for c in calls]
    await store.open_calls(session.id, epoch, drafts, calls, cwd="/workspace", expires_at=None)
    await store.defer(session.id, epoch, calls[0].call_id)
    await store.end_turn(
        session.id, epoch, [], end_id=session.id, usage=Usage(), stop_reason=events.END_TURN, how="parked"
    )
    await store.release(session.id, epoch)
    return Waiting(session.id, tuple(call.call_id for call in calls))


def _call(call_id: str, index: int) -> Call:
    given = {"command": f"make step-{index}", "description": "A step of the task"}
    return Call(call_id=call_id, tool_name="Bash", input=given, digest=digest(given), verdict="ask")


def _json(record: BaseModel | dict[str, Any]) -> str:
    return record.model_dump_json() if isinstance(record, BaseModel) else json.dumps(record)
