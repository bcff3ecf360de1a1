"""What the CLI adds to its transcript goes along with the session's next write, in order, and is never left behind."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import pytest

from claude_hitl_template.domain import events
from claude_hitl_template.domain.models import Usage
from claude_hitl_template.errors import HitlError, StaleOwner, Unavailable
from claude_hitl_template.session.transcript_writes import MOST_ENTRIES, TranscriptWrites
from claude_hitl_template.store.protocol import Owners, TranscriptKey

KEY: TranscriptKey = {"scope": "s", "project_key": "-", "session_id": "t", "subpath": ""}


class Ledger:
    """Keeps the entries that each write brought, or fails with `error`."""

    def __init__(self) -> None:
        self.writes: list[tuple[str, list[Any]]] = []
        self.error: HitlError | None = None

    def _write(self, name: str, entries: list[Any]) -> None:
        if self.error is not None:
            raise self.error
        self.writes.append((name, entries))

    async def append_transcript(self, _key: TranscriptKey, entries: Sequence[Any], *, epoch: int) -> None:
        await asyncio.sleep(0)
        assert epoch == 3
        self._write("append_transcript", list(entries))

    async def commit(self, *_args: Any, transcript: Any = (), **_more: Any) -> None:
        self._write("commit", [entry for _, entries in transcript for entry in entries])

    async def end_turn(self, *_args: Any, transcript: Any = (), **_more: Any) -> None:
        self._write("end_turn", [entry for _, entries in transcript for entry in entries])

    async def release(self, _session_id: str, _epoch: int) -> bool:
        self._write("release", [])
        return True

    async def load_transcript(self, _key: TranscriptKey, *, epoch: int | None = None) -> list[Any]:
        return [entry for _, entries in self.writes for entry in entries]


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
async def writes(ledger: Ledger) -> AsyncIterator[TranscriptWrites]:
    made = TranscriptWrites(cast(Owners, ledger))
    yield made
    ledger.error = None
    await made.close()


async def add(writes: TranscriptWrites, *entries: int) -> None:
    await writes.append_transcript(KEY, [{"n": n} for n in entries], epoch=3)


async def end(writes: TranscriptWrites) -> None:
    await writes.of_owner().end_turn("s", 3, [], end_id="e", usage=Usage(), stop_reason=events.END_TURN)


def numbers(ledger: Ledger) -> list[int]:
    return [entry["n"] for _, entries in ledger.writes for entry in entries]


async def test_the_end_of_a_turn_takes_the_transcript_along(ledger: Ledger, writes: TranscriptWrites) -> None:
    await add(writes, 1)
    await add(writes, 2, 3)
    await end(writes)
    assert ledger.writes == [("end_turn", [{"n": 1}, {"n": 2}, {"n": 3}])]
    await end(writes)
    assert ledger.writes[1:] == [("end_turn", [])]


async def test_entries_that_no_write_takes_along_are_written_by_themselves(
    ledger: Ledger, writes: TranscriptWrites
) -> None:
    await add(writes, 1)
    await add(writes, 2)
    async with asyncio.timeout(5):
        while len(ledger.writes) < 2:
            await asyncio.sleep(0.01)
    assert [name for name, _ in ledger.writes] == ["append_transcript"] * 2
    assert numbers(ledger) == [1, 2]


async def test_the_order_stays_when_a_turn_ends_while_earlier_entries_are_written(
    ledger: Ledger, writes: TranscriptWrites
) -> None:
    await add(writes, 1)
    writing = asyncio.create_task(writes.flush())
    await asyncio.sleep(0)
    await add(writes, 2)
    await end(writes)
    await writing
    assert numbers(ledger) == [1, 2]


@pytest.mark.parametrize("error", [Unavailable("away"), StaleOwner("another one")])
async def test_a_failed_write_keeps_the_entries_and_the_turns_end_fails_with_it(
    ledger: Ledger, writes: TranscriptWrites, error: HitlError
) -> None:
    ledger.error = error
    await add(writes, 1)
    await asyncio.sleep(0.05)  # the write of its own fails
    with pytest.raises(type(error)):
        await end(writes)
    ledger.error = None
    await add(writes, 2)
    await end(writes)
    assert numbers(ledger) == [1, 2]


async def test_a_lease_is_given_up_and_a_transcript_read_with_all_entries_written(
    ledger: Ledger, writes: TranscriptWrites
) -> None:
    await add(writes, 1)
    assert await writes.of_owner().load_transcript(KEY) == [{"n": 1}]
    await add(writes, 2)
    assert await writes.of_owner().release("s", 3)
    assert [name for name, _ in ledger.writes] == ["append_transcript", "append_transcript", "release"]


async def test_the_end_of_an_owner_writes_what_is_left(ledger: Ledger, writes: TranscriptWrites) -> None:
    await add(writes, 1)
    await writes.close()
    assert numbers(ledger) == [1]


async def test_many_entries_wait_until_they_are_written(ledger: Ledger, writes: TranscriptWrites) -> None:
    await add(writes, *range(MOST_ENTRIES + 1))
    assert len(numbers(ledger)) == MOST_ENTRIES + 1
