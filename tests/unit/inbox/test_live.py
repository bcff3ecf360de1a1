"""One reader serves all open pages; when it fails they hear of it and another one starts."""

import asyncio
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import pytest

from claude_hitl_template.domain.models import ApprovalState
from claude_hitl_template.errors import StoreUnreachable, Unavailable
from claude_hitl_template.inbox import live
from claude_hitl_template.inbox.live import WAITING, Listening, Live
from claude_hitl_template.store.protocol import ApprovalChange, Changes, WaitingCall


def change(number: int) -> ApprovalChange:
    return ApprovalChange(
        id=f"appr_{number}",
        workspace_id="w",
        session_id="s",
        state=ApprovalState.PENDING,
        decided_by=None,
        votes=0,
        reviewer=None,
    )


class Ledger:
    """Answers with what a test puts into `answers`: changes, or an error."""

    def __init__(self) -> None:
        self.answers: asyncio.Queue[Any] = asyncio.Queue()
        self.asked: list[int] = []

    async def wait_approvals(self, after: int, *, timeout_s: float) -> Changes:
        self.asked.append(after)
        answer = await self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def get_waiting(
        self, approval_ids: Sequence[str], workspace_ids: Sequence[str] | None
    ) -> list[WaitingCall]:
        raise AssertionError("no test here shows a call")


async def heard(listening: Listening) -> list[ApprovalChange | None]:
    """The next changes, one by one."""
    found = await listening.next(5)
    return [change for batch in found for change in (batch.changes if batch else (None,))]


def news(*numbers: int, position: int = 1, complete: bool = True) -> Changes:
    return Changes(changes=tuple(map(change, numbers)), position=position, complete=complete)


async def test_all_pages_share_one_reader_which_ends_with_the_last_page() -> None:
    ledger = Ledger()
    shared = Live(ledger)
    with closing(shared.listen()) as one, closing(shared.listen()) as two:
        ledger.answers.put_nowait(news(1))
        for listening in (one, two):
            assert await heard(listening) == [change(1)]
        assert ledger.asked == [0, 1]
    ledger.answers.put_nowait(news(2))
    await asyncio.sleep(0)
    assert ledger.asked == [0, 1]


async def test_an_unreachable_ledger_is_asked_again_and_missed_changes_are_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(live, "AGAIN_S", 0.0)
    ledger = Ledger()
    with closing(Live(ledger).listen()) as listening:
        ledger.answers.put_nowait(StoreUnreachable("away"))
        ledger.answers.put_nowait(news(position=5, complete=False))
        ledger.answers.put_nowait(news(3, position=6, complete=False))
        assert await heard(listening) == [None, change(3)]


async def test_a_page_that_is_far_behind_looks_at_everything_again() -> None:
    ledger = Ledger()
    with closing(Live(ledger).listen()) as listening:
        for number in range(WAITING + 1):
            ledger.answers.put_nowait(news(number))
        while len(ledger.asked) < WAITING + 2:
            await asyncio.sleep(0)
        assert await heard(listening) == [None]


async def test_pages_of_a_reader_that_failed_connect_again_to_another_one() -> None:
    ledger = Ledger()
    shared = Live(ledger)
    with closing(shared.listen()) as listening:
        ledger.answers.put_nowait(ValueError("a defect"))
        with pytest.raises(Unavailable):
            await listening.next(5)
        with closing(shared.listen()) as again:
            ledger.answers.put_nowait(news(4))
            assert await heard(again) == [change(4)]
