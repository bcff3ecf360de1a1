"""Pieces of an answer travel together while a stream wants them, and not at all while none does."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, cast

from claude_hitl_template.session.engine import Preview
from claude_hitl_template.session.previews import PreviewSender
from claude_hitl_template.store.protocol import Owners


class Ledger:
    """Answers calls of `preview`, and keeps what they sent."""

    def __init__(self, *, wanted: bool) -> None:
        self.wanted, self.calls = wanted, list[Sequence[Mapping[str, Any]]]()

    async def preview(self, _session_id: str, _epoch: int, deltas: Sequence[Mapping[str, Any]]) -> bool:
        self.calls.append(deltas)
        await asyncio.sleep(0)
        return self.wanted


def piece(text: str | None) -> Preview:
    return Preview(event_id="sevt_1", type="agent.message", text=text)


async def sent(ledger: Ledger, pieces: Sequence[Preview]) -> PreviewSender:
    """The sender, after it was given the pieces one after another and sent what it sends at once."""
    tasks: list[asyncio.Task[None]] = []

    def spawn(work: Any) -> asyncio.Task[None]:
        tasks.append(asyncio.create_task(work))
        return tasks[-1]

    sender = PreviewSender(cast(Owners, ledger), "sesn_1", 1, spawn)
    for each in pieces:
        sender.add(each)
        for _ in range(5):
            await asyncio.sleep(0)
    sender.hurry()
    await asyncio.gather(*tasks)
    return sender


async def test_all_pieces_arrive_in_order_in_few_calls() -> None:
    ledger = Ledger(wanted=True)
    await sent(ledger, [piece(None), *(piece(str(n)) for n in range(30))])
    texts = [d["delta"]["content"]["text"] for call in ledger.calls for d in call if "delta" in d]
    assert texts == [str(n) for n in range(30)]
    assert len(ledger.calls) <= 3


async def test_while_no_stream_wants_them_only_the_beginning_of_an_answer_is_sent() -> None:
    ledger = Ledger(wanted=False)
    sender = await sent(ledger, [piece(None), *(piece(str(n)) for n in range(30))])
    assert [d["type"] for call in ledger.calls for d in call] == ["event_start"]
    ledger.wanted = True
    sender.add(piece(None))
    await asyncio.sleep(0.01)
    assert len(ledger.calls) == 2
    await sender.stop()
