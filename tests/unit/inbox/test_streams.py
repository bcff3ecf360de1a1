"""However many pages are open, a change is read and rendered once; each page hears of what its reader may see."""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

from claude_hitl_template.domain.people import Actor
from claude_hitl_template.errors import Unauthorized
from claude_hitl_template.inbox import streams
from claude_hitl_template.inbox.app import build_inbox_app
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.testing.memory_backend import MemoryBackend
from tests.contract.asking import said
from tests.inbox import desk, listening


class Counted:
    """A store that counts what it is asked."""

    def __init__(self, store: CoreStore) -> None:
        self._store, self.asked = store, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        self.asked[name] += 1
        return getattr(self._store, name)


async def test_a_change_is_read_once_for_all_pages_and_a_decision_not_at_all() -> None:
    counted = Counted(CoreStore(MemoryBackend()))
    async with AsyncExitStack() as stack:
        on = await stack.enter_async_context(desk(counted))  # pyright: ignore[reportArgumentType]
        app = build_inbox_app(on.pages())
        pages = {
            (person, query): [
                await stack.enter_async_context(listening(app, person, query)) for _ in range(10)
            ]
            for person, query in (("ann", "rows=yes"), ("vic", "rows=yes"), ("ann", "rows=yes&tool=WebFetch"))
        }
        others = [await stack.enter_async_context(listening(app, "bob"))]
        approval = await on.ask()
        before = counted.asked.copy()
        for (person, query), same in pages.items():
            for page in same:
                event, heard = await page.next()
                assert (event, heard["id"], heard["state"]) == ("approval", approval.id, "pending")
                assert (f"row-{approval.id}" in heard["row"]) is ("tool" not in query)
                assert ("checkbox" in heard["row"]) is (person == "ann" and "tool" not in query)
        await on.store.decide(approval.id, None, said("x", "deny"), by=Actor(name="carol"))
        for page in (page for same in pages.values() for page in same):
            event, heard = await page.next()
            assert (heard["state"], heard["by"], heard["row"]) == ("denied", "carol", "")
        asked = counted.asked - before
        assert asked["get_waiting"] == 1
        assert asked["wait_approvals"] <= 3
        assert set(asked) <= {"get_waiting", "wait_approvals", "decide"}
        assert others[0].frames.empty(), "it is another workspace's"


async def test_a_reader_who_is_signed_out_hears_that_and_nothing_after(monkeypatch: Any) -> None:
    monkeypatch.setattr(streams, "CHECK_S", 0.05)
    async with desk() as on, listening(build_inbox_app(on.pages()), "ann") as page:
        del on.signed_in.people["ann"]
        assert await page.next() == ("signed-out", {})
        await on.ask()
        assert page.frames.empty()


async def test_a_stream_ends_without_a_word_when_the_ledger_is_away_so_that_its_page_connects_again() -> None:
    ended = asyncio.Event()

    async def source(timeout_s: float) -> list[str]:
        raise streams.Unavailable("away")

    async def check() -> None:
        raise Unauthorized("not asked")

    found = [text async for text in streams.stream_of(source, check, ended.set).body_iterator]
    assert found == [streams.frame("hello", {})]
    assert ended.is_set()
