"""the severity of calls, by which the inbox orders them"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    # 1 is medium, which calls have that no rule asked for.
    op.add_column("approvals", sa.Column("severity", sa.Integer(), nullable=False, server_default="1"))
    op.create_index("ix_approvals_severity", "approvals", ["state", "severity", "created_at", "id"])
    op.create_index(
        "ix_approvals_inbox_severity", "approvals", ["key_id", "state", "severity", "created_at", "id"]
    )
