"""passwords, and the sessions of browsers"""

import sqlalchemy as sa
from alembic import op

from claude_hitl_template.store.tables import UtcDateTime

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.create_table(
        "logins",
        sa.Column("principal_id", sa.String(), primary_key=True),
        sa.Column("doc", sa.JSON(), nullable=False),
    )
    op.create_table(
        "browser_sessions",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("token_hash", sa.String(), nullable=False, unique=True),
        sa.Column("principal_id", sa.String(), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=False),
        sa.Column("doc", sa.JSON(), nullable=False),
    )
    op.create_index("ix_browser_sessions_principal", "browser_sessions", ["principal_id"])
    op.create_index("ix_browser_sessions_expiry", "browser_sessions", ["expires_at"])
