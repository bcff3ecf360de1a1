"""workspaces, users and service accounts"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "workspaces",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("doc", sa.JSON(), nullable=False),
    )
    op.create_table(
        "principals",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("name", sa.String(), nullable=False, unique=True),
        sa.Column("external_id", sa.String(), unique=True),
        sa.Column("doc", sa.JSON(), nullable=False),
    )
