"""Ids for sessions to come. A CLI takes its session's id and folder when it starts, so one that is started before its
session exists has an id that is reserved, and the next session of the same kind takes it."""

from datetime import datetime, timedelta

from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.models import Agent, Environment, Session
from claude_hitl_template.store.backend import Reply, Tx

_RESERVED = "reserved"  # no workspace's scope of idempotency keys begins with it and a space


async def put(tx: Tx, session: Session, now: datetime, lasts_s: float) -> None:
    """Reserves the id of `session`, in place of the one that was reserved for the same kind. An id that a session has
    already stays that session's: the call may be repeated after it was taken."""
    scope, kind = _kind(session.workspace_id, session.agent, session.environment)
    await tx.take_reply(scope, kind)
    if await tx.session(session.id) is None:
        reserved = Reply(kind, session.id, now, now + timedelta(seconds=lasts_s))
        await tx.remember_reply(scope, kind, reserved, session_id=session.id)


async def take(
    tx: Tx, workspace_id: str, agent: Agent, environment: Environment, now: datetime
) -> str | None:
    """Returns the id that is reserved for a session of this kind, to one transaction alone."""
    reserved = await tx.take_reply(*_kind(workspace_id, agent, environment))
    return str(reserved.reply) if reserved is not None and reserved.expires_at > now else None


def _kind(workspace_id: str, agent: Agent, environment: Environment) -> tuple[str, str]:
    """Everything that its CLI's command line and sandbox depend on."""
    same = digest([agent.model_dump(mode="json"), environment.model_dump(mode="json")])
    return f"{_RESERVED} {workspace_id}", same
