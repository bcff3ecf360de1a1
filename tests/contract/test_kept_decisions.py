"""The decisions of a deleted session are kept (who, what, when), and nothing else of it."""

from typing import Any

import pytest

from claude_hitl_template.domain.people import Actor
from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.store.core import CoreStore
from tests.contract.asking import KEY, asking, said


async def test_of_a_deleted_session_the_decisions_are_kept_and_nothing_that_anybody_wrote(
    store: CoreStore, clock: Any
):
    session_id, other = await asking(store, "c1", "c2", "c3"), await asking(store, "c4")
    approvals = {a.call_id: a for a in (await store.list_approvals(KEY, limit=10)).data}
    await store.send_events(
        session_id, KEY, [said("c1", deny_message="a secret", result="deny")], by=Actor(name="ann")
    )
    clock.move(1)
    await store.send_events(
        session_id, KEY, [said("c2", updated_input={"command": "ls -l"})], by=Actor(name="bob")
    )
    assert (await store.list_kept_decisions(limit=10)).data == []
    await store.archive_session(session_id, KEY)  # c3 has no decision
    await store.delete_session(session_id, KEY)
    page = await store.list_kept_decisions(limit=1)
    rest = await store.list_kept_decisions(limit=10, page=page.next_page)
    assert rest.next_page is None
    denied, allowed = *page.data, *rest.data
    same = ("id", "session_id", "workspace_id", "tool_name", "digest")
    for kept, call_id in ((denied, "c1"), (allowed, "c2")):
        assert [getattr(kept, name) for name in same] == [getattr(approvals[call_id], name) for name in same]
    assert (denied.result, denied.decided_by, denied.run_digest) == ("deny", "ann", None)
    assert (allowed.result, allowed.decided_by, allowed.decided_at) == ("allow", "bob", clock.now)
    assert allowed.run_digest != allowed.digest
    text = denied.model_dump_json() + allowed.model_dump_json()
    assert "secret" not in text
    assert "ls" not in text
    assert [a.session_id for a in (await store.list_approvals(None, limit=10)).data] == [other]
    with pytest.raises(InvalidInput):
        await store.list_kept_decisions(limit=1, page="no cursor")


async def test_decisions_outlive_retention_too(store: CoreStore, clock: Any):
    session_id = await asking(store, "c1")
    await store.send_events(session_id, KEY, [said("c1", result="deny")], by=Actor(name="ann"))
    clock.move(40 * 86400)
    await store.give_up(session_id, "its owner died")
    await store.archive_session(session_id, KEY)
    clock.move(40 * 86400)
    assert await store.retire(clock.now) == [session_id]
    (kept,) = (await store.list_kept_decisions(limit=10)).data
    assert (kept.session_id, kept.decided_by) == (session_id, "ann")
