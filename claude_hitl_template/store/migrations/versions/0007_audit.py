"""the audit log: a chain of entries for each workspace, its head, and signed checkpoints"""

import sqlalchemy as sa
from alembic import op

from claude_hitl_template.store.tables import UtcDateTime

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table(
        "audit_heads",
        sa.Column("workspace_id", sa.String(), primary_key=True),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("hash", sa.String(), nullable=False),
    )
    op.create_table(
        "audit_entries",
        sa.Column("workspace_id", sa.String(), primary_key=True),
        sa.Column("seq", sa.BigInteger(), primary_key=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("actor_id", sa.String(), nullable=True),
        sa.Column("target", sa.String(), nullable=False),
        sa.Column("doc", sa.JSON(), nullable=False),
    )
    op.create_index("ix_audit_entries_time", "audit_entries", ["workspace_id", "created_at", "seq"])
    op.create_index("ix_audit_entries_action", "audit_entries", ["workspace_id", "action", "seq"])
    op.create_index("ix_audit_entries_actor", "audit_entries", ["workspace_id", "actor_id", "seq"])
    op.create_index("ix_audit_entries_target", "audit_entries", ["target", "seq"])
    op.create_table(
        "audit_checkpoints",
        sa.Column("workspace_id", sa.String(), primary_key=True),
        sa.Column("seq", sa.BigInteger(), primary_key=True),
        sa.Column("doc", sa.JSON(), nullable=False),
    )
