"""notices, and the channels that they are sent over"""

import sqlalchemy as sa
from alembic import op

from claude_hitl_template.store.tables import UtcDateTime

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.create_table(
        "channels",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("workspace_id", sa.String(), nullable=False),
        sa.Column("principal_id", sa.String()),
        sa.Column("kinds", sa.String(), nullable=False),
        sa.Column("secret", sa.String(), nullable=False),
        sa.Column("doc", sa.JSON(), nullable=False),
    )
    op.create_index("ix_channels_workspace", "channels", ["workspace_id", "kinds"])
    op.create_index("ix_channels_principal", "channels", ["principal_id"])
    op.create_table(
        "notices",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("session_id", sa.String()),
        sa.Column("doc", sa.JSON(), nullable=False),
    )
    op.create_index("ix_notices_session", "notices", ["session_id"])
    op.create_table(
        "deliveries",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("workspace_id", sa.String(), nullable=False),
        sa.Column("channel_id", sa.String()),
        sa.Column("session_id", sa.String()),
        sa.Column("approval_id", sa.String()),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("next_at", UtcDateTime(), nullable=False),
        sa.Column("doc", sa.JSON(), nullable=False),
    )
    op.create_index("ix_deliveries_due", "deliveries", ["state", "next_at"])
    op.create_index("ix_deliveries_created", "deliveries", ["created_at", "id"])
    op.create_index("ix_deliveries_workspace", "deliveries", ["workspace_id", "created_at", "id"])
    op.create_index("ix_deliveries_channel", "deliveries", ["channel_id", "created_at", "id"])
    op.create_index("ix_deliveries_session", "deliveries", ["session_id", "created_at", "id"])
    op.create_index("ix_deliveries_approval", "deliveries", ["approval_id", "channel_id"])
    op.create_table(
        "readers",
        sa.Column("principal_id", sa.String(), primary_key=True),
        sa.Column("seen_at", UtcDateTime(), nullable=False),
    )
