"""indexes for long listings"""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_index("ix_approvals_key", "approvals", ["key_id", "created_at", "id"])
    op.create_index("ix_approvals_state", "approvals", ["state", "created_at", "id"])
    op.create_index("ix_sessions_status", "sessions", ["key_id", "status", "created_at", "id"])
