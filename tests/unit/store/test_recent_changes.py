"""A reader of changes sees each one, or hears that some may be missing."""

from claude_hitl_template.store.signals import CHANGES_KEPT, RecentChanges


def test_a_first_reader_gets_the_position_of_now_and_then_each_change_once() -> None:
    changes = RecentChanges()
    found, position, complete = changes.after(0)
    assert (found, complete) == ([], False)
    changes.add({"id": "a"})
    changes.add({"id": "b"})
    found, position, complete = changes.after(position)
    assert ([change["id"] for change in found], complete) == (["a", "b"], True)
    assert changes.after(position) == ([], position, True)


def test_a_change_of_a_ledger_whose_clock_is_behind_is_seen() -> None:
    changes = RecentChanges()
    _, position, _ = changes.after(0)
    changes.add({"id": "late"}, 17)
    found, _, complete = changes.after(position)
    assert ([change["id"] for change in found], complete) == (["late"], True)


def test_a_reader_that_is_too_far_behind_hears_that_changes_are_missing() -> None:
    changes = RecentChanges()
    _, position, _ = changes.after(0)
    for number in range(CHANGES_KEPT + 1):
        changes.add({"id": str(number)})
    assert not changes.after(position)[2]
    _, position, _ = changes.after(position)
    changes.forget()
    assert not changes.after(position)[2]
