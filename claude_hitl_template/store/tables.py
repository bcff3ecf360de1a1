"""The schema. Each table holds its record as a JSON document, beside the columns that queries look at.

A change here needs a migration in store/migrations/versions; a test compares the two.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    TypeDecorator,
    UniqueConstraint,
)


class UtcDateTime(TypeDecorator[datetime]):
    """A time in UTC, with microseconds; naive in the database, aware in Python."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


metadata = MetaData()

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String, primary_key=True),
    Column("secret_hash", String, nullable=False, unique=True),
    Column("doc", JSON, nullable=False),
)

sessions = Table(
    "sessions",
    metadata,
    Column("id", String, primary_key=True),
    Column("key_id", String, nullable=False),
    Column("agent_id", String, nullable=False),
    Column("status", String, nullable=False),
    Column("archived", Boolean, nullable=False),
    Column("supervised", Boolean, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("doc", JSON, nullable=False),
    Index("ix_sessions_key", "key_id", "created_at", "id"),
)
# Parked sessions, the many, are not in it.
Index(
    "ix_sessions_supervised",
    sessions.c.id,
    sqlite_where=sessions.c.supervised,
    postgresql_where=sessions.c.supervised,
)

events = Table(
    "events",
    metadata,
    Column("session_id", String, primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("id", String, nullable=False),
    Column("type", String, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("processed_at", UtcDateTime),
    Column("payload", JSON, nullable=False),
    UniqueConstraint("session_id", "id", name="uq_events_id"),
)
_queued = events.c.processed_at.is_(None)
Index("ix_events_queued", events.c.session_id, events.c.seq, sqlite_where=_queued, postgresql_where=_queued)

approvals = Table(
    "approvals",
    metadata,
    Column("id", String, primary_key=True),
    Column("session_id", String, nullable=False),
    Column("key_id", String, nullable=False),
    Column("event_id", String, nullable=False),
    Column("call_id", String, nullable=False),
    Column("state", String, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("doc", JSON, nullable=False),
    UniqueConstraint("session_id", "event_id", name="uq_approvals_event"),
    Index("ix_approvals_inbox", "key_id", "state", "created_at", "id"),
    Index("ix_approvals_call", "session_id", "call_id"),
    Index("ix_approvals_session", "session_id", "state"),
)
_expiring = approvals.c.expires_at.is_not(None)
Index(
    "ix_approvals_due",
    approvals.c.state,
    approvals.c.expires_at,
    sqlite_where=_expiring,
    postgresql_where=_expiring,
)

replies = Table(
    "replies",
    metadata,
    Column("key_id", String, primary_key=True),
    Column("idempotency_key", String, primary_key=True),
    Column("digest", String, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("reply", JSON, nullable=False),
)

transcripts = Table(
    "transcripts",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("scope", String, nullable=False),
    Column("project_key", String, nullable=False),
    Column("session_id", String, nullable=False),
    Column("subpath", String, nullable=False),
    Column("uuid", String),
    Column("written_ms", BigInteger, nullable=False),
    Column("entry", JSON, nullable=False),
    UniqueConstraint("scope", "project_key", "session_id", "subpath", "uuid", name="uq_transcripts_uuid"),
    Index("ix_transcripts_key", "scope", "project_key", "session_id", "subpath", "id"),
)
