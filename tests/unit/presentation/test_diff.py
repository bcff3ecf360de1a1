"""A diff shows every line of both texts, or says how many equal ones it leaves out."""

from hypothesis import given
from hypothesis import strategies as st

from claude_hitl_template.presentation.diff import MAX_LINES, NO_NEWLINE, Diff, Side, diff, effort

lines = st.lists(st.sampled_from(["a", "b", "c c", "", "  d", "a b c"]), max_size=12)


def side(found: Diff, which: str) -> list[str]:
    sides: list[Side | None] = [getattr(row, which) for row in found.rows]
    return ["".join(piece.text for piece in one.pieces) for one in sides if one is not None]


@given(lines, lines)
def test_without_folds_both_texts_are_whole_and_numbered(old: list[str], new: list[str]) -> None:
    before, after = "".join(f"{line}\n" for line in old), "".join(f"{line}\n" for line in new)
    found = diff(before, after, context=None)
    assert side(found, "old") == old
    assert side(found, "new") == new
    assert [row.old.number for row in found.rows if row.old] == list(range(1, len(old) + 1))
    assert found.added - found.removed == len(new) - len(old)


@given(lines, lines, st.integers(0, 3))
def test_a_fold_says_how_many_equal_lines_it_hides(old: list[str], new: list[str], context: int) -> None:
    before, after = "".join(f"{line}\n" for line in old), "".join(f"{line}\n" for line in new)
    found = diff(before, after, context=context)
    hidden = sum(row.hidden for row in found.rows)
    assert len(side(found, "old")) + hidden == len(old)
    assert len(side(found, "new")) + hidden == len(new)


def test_the_words_that_changed_are_marked() -> None:
    [row] = diff("with open(path) as f:\n", "with open(path, 'w') as f:\n").rows
    assert row.new is not None
    assert "".join(piece.text for piece in row.new.pieces if piece.changed) == ", 'w'"


def test_a_line_break_at_the_end_is_a_difference() -> None:
    assert side(diff("a\n", "a"), "new") == [f"a{NO_NEWLINE}"]
    assert not diff("a", "a").added
    assert side(diff("x", "y"), "new") == ["y"]


def test_a_very_large_change_is_shown_as_a_replaced_part() -> None:
    old = "".join(f"a{n}\n" for n in range(5000))
    found = diff(old, old.replace("a", "b"))
    assert (found.added, found.removed) == (5000, 5000)


def test_the_effort_counts_what_is_compared_between_equal_beginnings_and_ends() -> None:
    same = "same\n" * 50
    assert effort(same, same) == 0
    assert effort(f"{same}a\nb\n{same}", f"{same}c\n{same}") == 2 * 1 + 3
    assert effort("a\n" * (MAX_LINES + 1), "b\n") == MAX_LINES + 2  # shown as replaced, not compared
