"""Run by alembic: applies the migrations to the URL that `store.sql.migrate` hands over, with the blocking driver."""

import sqlalchemy as sa
from alembic import context

from claude_hitl_template.store.tables import metadata

engine = sa.create_engine(
    context.config.attributes["url"].replace("+aiosqlite", ""), poolclass=sa.pool.NullPool
)
with engine.begin() as connection:
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()
engine.dispose()
