"""Sessions of a Store that wait for a human, and the decisions that a human may send."""

from datetime import datetime
from typing import Any

from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.events import UserMessage, UserToolConfirmation
from claude_hitl_template.domain.models import Agent, ApiKey, Environment, Event, Identity, Session
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.protocol import Call

KEY = "key_1"
INPUT = {"command": "ls"}


def message(text: str = "go") -> UserMessage:
    return UserMessage.model_validate({"type": "user.message", "content": [{"type": "text", "text": text}]})


def said(call_id: str, result: str = "allow", **more: Any) -> UserToolConfirmation:
    body = {"type": "user.tool_confirmation", "tool_use_id": call_id, "result": result, **more}
    return UserToolConfirmation.model_validate(body)


def ask_for(call_id: str) -> Call:
    return Call(call_id=call_id, tool_name="Bash", input=INPUT, digest=digest(INPUT), verdict="ask")


async def create(
    store: CoreStore, *, once: str | None = None, first: str | None = "go", workspace_id: str = KEY
) -> Session:
    return await store.create_session(
        workspace_id,
        agent=Agent(),
        environment=Environment(),
        title=None,
        metadata={},
        initial=[message(first)] if first else [],
        idempotency_key=once,
    )


async def asking(store: CoreStore, *call_ids: str, expires_at: datetime | None = None) -> str:
    """Creates a session that waits for these calls; its owner has epoch 1."""
    session = await create(store)
    await store.acquire(session.id, "owner", lease_s=15)
    calls = [ask_for(call_id) for call_id in call_ids]
    await store.open_calls(session.id, 1, [], calls, cwd="/w", expires_at=expires_at)
    return session.id


async def log(store: CoreStore, session_id: str, *types: str) -> list[Event]:
    return (await store.list_events(session_id, KEY, limit=1000, types=types)).data


def key_of(found: Identity | None) -> ApiKey | None:
    """The key that was found; None if there is none."""
    return None if found is None else found.key
