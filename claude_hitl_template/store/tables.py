"""The schema. Each table holds its record as a JSON document, and in columns the fields that queries use.

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


class Name(TypeDecorator[str]):
    """A text that is looked for. Postgres has no NUL in text: one that comes from outside finds nothing."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        if value is None or dialect.name != "postgresql":
            return value
        return value.replace("\0", "\ufffd")


# A serial of 32 bits would be used up by a busy cluster's transcripts; SQLite counts with 64 as it is.
Serial = BigInteger().with_variant(Integer, "sqlite")
metadata = MetaData()

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Name, primary_key=True),
    Column("secret_hash", Name, nullable=False, unique=True),
    Column("doc", JSON, nullable=False),
)

# A workspace owns what an API key owned before. The column keeps its name, and the workspace of such a key has the key's id,
# so that no row changes, and an earlier version sees the same during a deploy.
workspaces = Table(
    "workspaces",
    metadata,
    Column("id", Name, primary_key=True),
    Column("doc", JSON, nullable=False),
)

principals = Table(
    "principals",
    metadata,
    Column("id", Name, primary_key=True),
    Column("name", Name, nullable=False, unique=True),
    Column("external_id", Name, unique=True),
    Column("doc", JSON, nullable=False),
)

policies = Table(
    "workspace_policies",
    metadata,
    Column("workspace_id", Name, primary_key=True),
    Column("version", Integer, nullable=False),
    Column("doc", JSON, nullable=False),
)

# How users sign in: the hashes of their passwords, and what a sign-in provider's groups gave them.
logins = Table(
    "logins",
    metadata,
    Column("principal_id", Name, primary_key=True),
    Column("doc", JSON, nullable=False),
)

browser_sessions = Table(
    "browser_sessions",
    metadata,
    Column("id", Name, primary_key=True),
    Column("token_hash", Name, nullable=False, unique=True),
    Column("principal_id", Name, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    Column("doc", JSON, nullable=False),
    Index("ix_browser_sessions_principal", "principal_id"),
    Index("ix_browser_sessions_expiry", "expires_at"),
)

sessions = Table(
    "sessions",
    metadata,
    Column("id", Name, primary_key=True),
    Column("key_id", Name, nullable=False, key="workspace_id"),
    Column("agent_id", Name, nullable=False),
    Column("status", Name, nullable=False),
    Column("archived", Boolean, nullable=False),
    Column("supervised", Boolean, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("doc", JSON, nullable=False),
    Index("ix_sessions_key", "workspace_id", "created_at", "id"),
    Index("ix_sessions_status", "workspace_id", "status", "created_at", "id"),
    Index("ix_sessions_created", "created_at"),
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
    Column("session_id", Name, primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("id", Name, nullable=False),
    Column("type", Name, nullable=False),
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
    Column("id", Name, primary_key=True),
    Column("session_id", Name, nullable=False),
    Column("key_id", Name, nullable=False, key="workspace_id"),
    Column("event_id", Name, nullable=False),
    Column("call_id", Name, nullable=False),
    Column("state", Name, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("severity", Integer, nullable=False, server_default="1"),  # its place in tiers.SEVERITIES
    Column("doc", JSON, nullable=False),
    UniqueConstraint("session_id", "event_id", name="uq_approvals_event"),
    Index("ix_approvals_inbox", "workspace_id", "state", "created_at", "id"),
    Index("ix_approvals_key", "workspace_id", "created_at", "id"),
    Index("ix_approvals_severity", "state", "severity", "created_at", "id"),
    Index("ix_approvals_inbox_severity", "workspace_id", "state", "severity", "created_at", "id"),
    # The inbox of users who may decide on all keys' calls.
    Index("ix_approvals_state", "state", "created_at", "id"),
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

# Of the sessions that were deleted: who decided what on which call, without any text of users.
kept_decisions = Table(
    "kept_decisions",
    metadata,
    Column("id", Name, primary_key=True),
    Column("session_id", Name, nullable=False),
    Column("decided_at", UtcDateTime, nullable=False),
    Column("doc", JSON, nullable=False),
    Index("ix_kept_decisions_time", "decided_at", "id"),
)

replies = Table(
    "replies",
    metadata,
    Column("key_id", Name, primary_key=True, key="scope"),
    Column("idempotency_key", Name, primary_key=True),
    Column("digest", Name, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("reply", JSON, nullable=False),
    Column("session_id", Name),  # with which it goes; an earlier version left it empty, and the next one too
    Column("expires_at", UtcDateTime),
    Index("ix_replies_session", "session_id"),
    Index("ix_replies_expiry", "expires_at", "created_at"),
)

transcripts = Table(
    "transcripts",
    metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),
    Column("scope", Name, nullable=False),
    Column("project_key", Name, nullable=False),
    Column("session_id", Name, nullable=False),
    Column("subpath", Name, nullable=False),
    Column("uuid", Name),
    Column("written_ms", BigInteger, nullable=False),
    Column("entry", JSON, nullable=False),
    UniqueConstraint("scope", "project_key", "session_id", "subpath", "uuid", name="uq_transcripts_uuid"),
    Index("ix_transcripts_key", "scope", "project_key", "session_id", "subpath", "id"),
)

# The last entry of each workspace's audit log; its row's lock keeps those that append apart.
audit_heads = Table(
    "audit_heads",
    metadata,
    Column("workspace_id", Name, primary_key=True),
    Column("seq", BigInteger, nullable=False),
    Column("hash", Name, nullable=False),
)

# Entries outlive sessions, keys and principals.
audit_entries = Table(
    "audit_entries",
    metadata,
    Column("workspace_id", Name, primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("created_at", UtcDateTime, nullable=False),
    Column("action", Name, nullable=False),
    Column("actor_id", Name),
    Column("target", Name, nullable=False),
    Column("doc", JSON, nullable=False),
    Index("ix_audit_entries_time", "workspace_id", "created_at", "seq"),
    Index("ix_audit_entries_action", "workspace_id", "action", "seq"),
    Index("ix_audit_entries_actor", "workspace_id", "actor_id", "seq"),
    Index("ix_audit_entries_target", "target", "seq"),
)

audit_checkpoints = Table(
    "audit_checkpoints",
    metadata,
    Column("workspace_id", Name, primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("doc", JSON, nullable=False),
)

# Where notices are sent; `kinds` are the notices that it gets, `secret` its encrypted secrets.
channels = Table(
    "channels",
    metadata,
    Column("id", Name, primary_key=True),
    Column("workspace_id", Name, nullable=False),
    Column("principal_id", Name),
    Column("kinds", String, nullable=False),
    Column("secret", String, nullable=False),
    Column("doc", JSON, nullable=False),
    Index("ix_channels_workspace", "workspace_id", "kinds"),
    Index("ix_channels_principal", "principal_id"),
)

# The outbox: notices that have no deliveries yet.
notices = Table(
    "notices",
    metadata,
    Column("id", Name, primary_key=True),
    Column("session_id", Name),
    Column("doc", JSON, nullable=False),
    Index("ix_notices_session", "session_id"),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", Name, primary_key=True),
    Column("workspace_id", Name, nullable=False),
    Column("channel_id", Name),
    Column("session_id", Name),
    Column("approval_id", Name),
    Column("state", Name, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("next_at", UtcDateTime, nullable=False),
    Column("doc", JSON, nullable=False),
    Index("ix_deliveries_due", "state", "next_at"),
    Index("ix_deliveries_created", "created_at", "id"),
    Index("ix_deliveries_workspace", "workspace_id", "created_at", "id"),
    Index("ix_deliveries_channel", "channel_id", "created_at", "id"),
    Index("ix_deliveries_session", "session_id", "created_at", "id"),
    Index("ix_deliveries_approval", "approval_id", "channel_id"),
)

# When a person last had the inbox open and visible.
readers = Table(
    "readers",
    metadata,
    Column("principal_id", Name, primary_key=True),
    Column("seen_at", UtcDateTime, nullable=False),
)
