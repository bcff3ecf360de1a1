"""The frequent statements, built once (prepared.py). Their first parameter is `key`, where they look for one value."""

from collections.abc import Callable
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from claude_hitl_template.store.backend import OPEN
from claude_hitl_template.store.prepared import prepared
from claude_hitl_template.store.tables import (
    Name,
    api_keys,
    approvals,
    audit_entries,
    audit_heads,
    channels,
    events,
    policies,
    principals,
    replies,
    sessions,
    transcripts,
    workspaces,
)

type Query = sa.Select[*tuple[Any, ...]]


def _by(column: sa.Column[Any], *selected: sa.ColumnElement[Any]) -> Query:
    """Selects the rows whose column is the parameter `key`."""
    return prepared(sa.select(*selected).where(column == sa.bindparam("key")))


@cache
def upserting(
    insert: Callable[[sa.Table], Any], table: sa.Table, names: tuple[str, ...], key: str
) -> sa.Executable:
    statement = insert(table).values({name: sa.bindparam(name) for name in names})
    changed = {name: statement.excluded[name] for name in names if name != key}
    return prepared(statement.on_conflict_do_update(index_elements=[table.c[key]], set_=changed))


@cache
def known_events(count: int) -> Query:
    """Which of so many events a session has; the parameters of their ids are `id0`, `id1` and so on."""
    ids = [sa.bindparam(f"id{number}", type_=events.c.id.type) for number in range(count)]
    return prepared(_by(events.c.session_id, events.c.id).where(events.c.id.in_(ids)))


EVENT = (
    events.c.seq,
    events.c.id,
    events.c.type,
    events.c.created_at,
    events.c.processed_at,
    events.c.payload,
)
KEY_OF_SECRET = _by(api_keys.c.secret_hash, api_keys.c.doc)
WORKSPACE = _by(workspaces.c.id, workspaces.c.doc)
PRINCIPAL = _by(principals.c.id, principals.c.doc)
POLICY = _by(policies.c.workspace_id, policies.c.doc)
SESSION = _by(sessions.c.id, sessions.c.doc)
# Of a workspace's own channels, and of those of all workspaces (`everywhere`).
WANTED_KINDS = prepared(
    sa.select(channels.c.kinds)
    .where(
        channels.c.workspace_id.in_([sa.bindparam("key", type_=Name), sa.bindparam("everywhere", type_=Name)])
    )
    .distinct()
)
AUDIT_HEAD = _by(audit_heads.c.workspace_id, audit_heads.c.seq, audit_heads.c.hash)
APPROVAL = _by(approvals.c.id, approvals.c.doc)
APPROVAL_OF_EVENT, APPROVAL_OF_CALL = (
    prepared(_by(approvals.c.session_id, approvals.c.doc).where(column == sa.bindparam("call_id")))
    for column in (approvals.c.event_id, approvals.c.call_id)
)
OPEN_APPROVALS = prepared(
    _by(approvals.c.session_id, approvals.c.doc)
    .where(approvals.c.state.in_([sa.literal_column(f"'{state.value}'") for state in OPEN]))
    .order_by(approvals.c.created_at, approvals.c.id)
)
ONE_EVENT = prepared(_by(events.c.session_id, *EVENT).where(events.c.id == sa.bindparam("event_id")))
NEXT_EVENTS = prepared(
    _by(events.c.session_id, *EVENT)
    .where(events.c.seq > sa.bindparam("after"))
    .order_by(events.c.seq)
    .limit(sa.bindparam("most"))
)
QUEUED = prepared(
    _by(events.c.session_id, *EVENT).where(events.c.processed_at.is_(None)).order_by(events.c.seq)
)
SET_PROCESSED = prepared(
    sa.update(events)
    .where(events.c.session_id == sa.bindparam("key"), events.c.id == sa.bindparam("event_id"))
    .values(processed_at=sa.bindparam("at"))
)
ADD_EVENTS, ADD_ENTRIES, ADD_REPLY = (
    prepared(sa.insert(table)) for table in (events, audit_entries, replies)
)
REPLY = prepared(
    _by(replies.c.scope, replies.c.digest, replies.c.reply, replies.c.created_at, replies.c.expires_at).where(
        replies.c.idempotency_key == sa.bindparam("idempotency_key")
    )
)
DROP_REPLY = prepared(
    sa.delete(replies).where(
        replies.c.scope == sa.bindparam("key"),
        replies.c.idempotency_key == sa.bindparam("idempotency_key"),
        replies.c.created_at == sa.bindparam("created_at"),
    )
)
ADD_TRANSCRIPT = {
    insert: prepared(insert(transcripts).on_conflict_do_nothing())
    for insert in (postgresql.insert, sqlite.insert)
}
TRANSCRIPT_PIECE = prepared(
    sa.select(transcripts.c.id, transcripts.c.entry)
    .where(
        *(
            transcripts.c[name] == sa.bindparam(name)
            for name in ("scope", "project_key", "session_id", "subpath")
        ),
        transcripts.c.id > sa.bindparam("after"),
    )
    .order_by(transcripts.c.id)
    .limit(sa.bindparam("most"))
)
