"""A session's row keeps the keys that earlier releases wrote, although the fields have other names in the code."""

from pathlib import Path

import sqlalchemy as sa

from claude_hitl_template.domain.models import Agent, Environment
from claude_hitl_template.store import tables
from claude_hitl_template.store.connect import migrate
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.sqlite import SqliteBackend, sqlite_url


async def test_a_row_with_the_keys_of_earlier_releases_is_read_and_written_with_them(tmp_path: Path):
    url = sqlite_url(tmp_path / "hitl.db")
    migrate(url)
    backend = SqliteBackend(url)
    store = CoreStore(backend)
    made = await store.create_session(
        "key", agent=Agent(), environment=Environment(), title=None, metadata={}, initial=[]
    )
    engine = sa.create_engine(url)
    rows = tables.sessions
    with engine.begin() as connection:
        [document] = connection.execute(sa.select(rows.c.doc)).scalars()
        assert {"wakes", "untold"} <= document.keys()
        connection.execute(
            sa.update(rows).values(doc={**document, "wakes": 41, "untold": ["appr_1", "appr_2"]})
        )

    found = await store.get_session(made.id, "key")
    assert (found.revision, found.unreported_refusals) == (41, ("appr_1", "appr_2"))

    await store.update_session(made.id, "key", changes={"title": "written by this release"})
    with engine.connect() as connection:
        [document] = connection.execute(sa.select(rows.c.doc)).scalars()
    assert (document["title"], document["untold"]) == ("written by this release", ["appr_1", "appr_2"])
    assert document["wakes"] >= 41
    assert not {"revision", "unreported_refusals"} & document.keys()
    await backend.close()
    engine.dispose()
