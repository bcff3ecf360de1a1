"""What followers get from memory is what the store has, without a gap; else they have to read it."""

from datetime import UTC, datetime

import pytest

from claude_hitl_template.domain.models import Event
from claude_hitl_template.store.signals import EVENTS_KEPT, RecentEvents

AT = datetime(2030, 1, 2, tzinfo=UTC)


def events(*seqs: int) -> list[Event]:
    return [
        Event(seq=seq, id=f"sevt_{seq}", type="t", payload={}, created_at=AT, processed_at=AT) for seq in seqs
    ]


def known(last: int = 5) -> RecentEvents:
    recent = RecentEvents()
    recent.want("s", 60.0)
    recent.know("s", "w", last)
    return recent


def test_what_is_committed_after_the_store_was_read_comes_from_memory():
    recent = known()
    assert recent.after("s", "w", 5) == []
    recent.add("s", events(6, 7))
    assert recent.after("s", "w", 5) == events(6, 7)
    recent.add("s", events(8))
    assert recent.after("s", None, 7) == events(8)


def test_what_is_committed_while_the_store_is_read_is_neither_lost_nor_repeated():
    recent = RecentEvents()
    recent.want("s", 60.0)
    recent.add("s", events(5, 6))
    assert recent.after("s", "w", 4) is None
    recent.know("s", "w", 5)
    assert recent.after("s", "w", 5) == events(6)


def test_a_reader_that_is_further_behind_has_to_read():
    recent = known()
    recent.add("s", events(6, 7))
    assert recent.after("s", "w", 4) is None
    assert recent.after("s", "w", 6) == events(7)
    assert recent.after("s", "w", 5) is None
    assert recent.after("s", "w", 9) is None


@pytest.mark.parametrize("seqs", [(7,), (7, 6), (5,), tuple(range(6, 7 + EVENTS_KEPT))])
def test_a_gap_a_repeat_and_more_than_is_kept_have_to_be_read(seqs: tuple[int, ...]):
    recent = known()
    recent.add("s", events(*seqs))
    assert recent.after("s", "w", 5) is None


def test_another_workspace_and_a_session_that_is_gone_have_to_be_read():
    recent = known()
    assert recent.after("s", "another", 5) is None
    recent.forget("s")
    assert recent.after("s", "w", 5) is None


def test_a_session_that_is_followed_no_more_is_forgotten():
    recent = RecentEvents()
    recent.want("s", -1.0)
    recent.know("s", "w", 5)
    recent.want("another", 60.0)
    assert recent.after("s", "w", 5) is None
