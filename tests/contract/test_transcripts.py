"""The CLI's transcripts in the Store satisfy the SDK's requirements of a SessionStore."""

import uuid

import pytest
from claude_agent_sdk.testing import run_session_store_conformance

from claude_hitl_template.claude.transcripts import TranscriptStore
from claude_hitl_template.domain.models import Agent, Environment
from claude_hitl_template.errors import StaleOwner
from claude_hitl_template.store.core import CoreStore


async def test_sdk_conformance(store: CoreStore):
    await run_session_store_conformance(lambda: TranscriptStore(store, uuid.uuid4().hex))


async def test_any_folder_finds_a_transcript_from_another_folder(store: CoreStore):
    transcripts = TranscriptStore(store, "scope", any_folder=True)
    await transcripts.append({"project_key": "-a", "session_id": "s"}, [{"type": "user", "uuid": "1"}])
    loaded = await transcripts.load({"project_key": "-b", "session_id": "s"})
    assert loaded == [{"type": "user", "uuid": "1"}]


async def test_a_transcript_entry_is_kept_once(store: CoreStore):
    transcripts = TranscriptStore(store, "scope")
    key = {"project_key": "p", "session_id": "s"}
    await transcripts.append(key, [{"type": "user", "uuid": "1"}])
    await transcripts.append(key, [{"type": "user", "uuid": "1"}, {"type": "user", "uuid": "2"}])
    assert [e["uuid"] for e in await transcripts.load(key) or ()] == ["1", "2"]


async def test_a_transcript_entry_repeated_in_one_append_is_kept_once(store: CoreStore):
    transcripts = TranscriptStore(store, "scope")
    key = {"project_key": "p", "session_id": "s"}
    await transcripts.append(key, [{"type": "user", "uuid": "1"}, {"type": "user", "uuid": "1"}])
    assert [e["uuid"] for e in await transcripts.load(key) or ()] == ["1"]


async def test_a_stale_owner_neither_writes_nor_reads_a_transcript(store: CoreStore):
    session = await store.create_session(
        "key", agent=Agent(), environment=Environment(), title=None, metadata={}, initial=[]
    )
    await store.acquire(session.id, "one", lease_s=15)
    stale = TranscriptStore(store, session.id, epoch=1)
    key = {"project_key": "p", "session_id": "s"}
    await stale.append(key, [{"type": "user", "uuid": "1"}])
    await store.acquire(session.id, "two", lease_s=15)
    for late in (
        stale.append(key, [{"type": "user", "uuid": "2"}]),
        stale.load(key),
        stale.delete(key),
        stale.list_subkeys(key),
    ):
        with pytest.raises(StaleOwner):
            await late
    there = TranscriptStore(store, session.id, epoch=2)
    assert [e["uuid"] for e in await there.load(key) or ()] == ["1"]
