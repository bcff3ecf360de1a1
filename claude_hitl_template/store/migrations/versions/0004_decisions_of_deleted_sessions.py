"""decisions outlive their session, without what was decided on"""

import sqlalchemy as sa
from alembic import op

from claude_hitl_template.store.tables import UtcDateTime

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "kept_decisions",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("session_id", sa.String(), nullable=False),
        sa.Column("decided_at", UtcDateTime(), nullable=False),
        sa.Column("doc", sa.JSON(), nullable=False),
    )
    op.create_index("ix_kept_decisions_time", "kept_decisions", ["decided_at", "id"])
