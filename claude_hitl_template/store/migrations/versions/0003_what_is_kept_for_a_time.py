"""retention: replies with their session and expiry, and the oldest sessions"""

import sqlalchemy as sa
from alembic import op

from claude_hitl_template.store.tables import UtcDateTime

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("replies", sa.Column("session_id", sa.String(), nullable=True))
    op.add_column("replies", sa.Column("expires_at", UtcDateTime(), nullable=True))
    op.create_index("ix_replies_session", "replies", ["session_id"])
    op.create_index("ix_replies_expiry", "replies", ["expires_at", "created_at"])
    op.create_index("ix_sessions_created", "sessions", ["created_at"])
