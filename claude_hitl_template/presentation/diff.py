"""Two texts side by side: rows of a diff with line numbers, the words that changed, and folds of equal lines."""

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

CONTEXT = 3  # equal lines shown around a change
MAX_LINES = 2000  # of a changed part; a larger one is shown as a whole that was replaced
MAX_WORDS_CHARS = 500  # of a line whose changed words are marked
NO_NEWLINE = "  ⊣ no line break"
_WORDS = re.compile(r"\w+|\s+|[^\w\s]")

type Kind = Literal["same", "change", "gap"]


@dataclass(frozen=True)
class Piece:
    """A part of a line. `changed`: it is not in the line on the other side."""

    text: str
    changed: bool = False


@dataclass(frozen=True)
class Side:
    """One line of a text; `number` counts from 1."""

    number: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Row:
    """A line of both texts. None: there is no such line on this side. `hidden`: how many equal lines a gap leaves out."""

    kind: Kind
    old: Side | None = None
    new: Side | None = None
    hidden: int = 0


@dataclass(frozen=True)
class Group:
    """Rows of one kind, one after the other; a gap is alone."""

    kind: Kind
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Diff:
    """`added` and `removed` count lines."""

    rows: tuple[Row, ...]
    added: int
    removed: int

    @property
    def groups(self) -> list[Group]:
        """The rows as a narrow screen shows them: what was removed, then what was added."""
        return [_group(rows) for _, rows in itertools.groupby(self.rows, lambda row: row.kind)]


def _group(rows: Iterable[Row]) -> Group:
    found = tuple(rows)
    return Group(found[0].kind, found)


def diff(old: str, new: str, *, context: int | None = CONTEXT) -> Diff:
    """The rows of a diff.

    Args:
        old: The text before.
        new: The text after.
        context: How many equal lines to show around a change; None for all.
    """
    differs = bool(old and new) and old.endswith("\n") != new.endswith("\n")
    before, after = _lines(old, mark_end=differs), _lines(new, mark_end=differs)
    rows: list[Row] = []
    added = removed = 0
    opcodes = list(_opcodes(before, after))
    for position, (is_same, i1, i2, j1, j2) in enumerate(opcodes):
        if is_same:
            is_first, is_last = position == 0, position == len(opcodes) - 1
            rows += _same(before, i1, i2, j1, context, is_first=is_first, is_last=is_last)
        else:
            removed, added = removed + i2 - i1, added + j2 - j1
            rows += _changed(before[i1:i2], after[j1:j2], i1, j1)
    return Diff(tuple(rows), added, removed)


def _lines(text: str, *, mark_end: bool) -> list[str]:
    """The lines of a text, split at newlines only. `mark_end`: say it where the last line has no line break."""
    lines = text.split("\n")
    if lines[-1] == "":
        return lines[:-1]
    return [*lines[:-1], f"{lines[-1]}{NO_NEWLINE}"] if mark_end else lines


def _opcodes(before: Sequence[str], after: Sequence[str]) -> Iterator[tuple[bool, int, int, int, int]]:
    """(whether equal, from, to, from, to). Equal beginnings and ends are cut off first: most edits are small."""
    start, end = _equal_ends(before, after)
    if start:
        yield True, 0, start, 0, start
    old, new = before[start : len(before) - end], after[start : len(after) - end]
    if old and new and max(len(old), len(new)) <= MAX_LINES:
        matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
        for tag, i1, i2, j1, j2 in matcher.get_opcodes():
            yield tag == "equal", i1 + start, i2 + start, j1 + start, j2 + start
    elif old or new:
        yield False, start, len(before) - end, start, len(after) - end
    if end:
        yield True, len(before) - end, len(before), len(after) - end, len(after)


def _equal_ends(before: Sequence[str], after: Sequence[str]) -> tuple[int, int]:
    """How many lines both begin and end with."""
    start, most = 0, min(len(before), len(after))
    while start < most and before[start] == after[start]:
        start += 1
    end = 0
    while end < most - start and before[-1 - end] == after[-1 - end]:
        end += 1
    return start, end


def effort(old: str, new: str) -> int:
    """What `diff` costs: pairs of lines to compare between the equal ends of both texts, and lines."""
    before, after = _lines(old, mark_end=False), _lines(new, mark_end=False)
    left, right = (len(lines) - sum(_equal_ends(before, after)) for lines in (before, after))
    pairs = left * right if max(left, right) <= MAX_LINES else 0
    return pairs + left + right


def _same(
    lines: Sequence[str], i1: int, i2: int, j1: int, context: int | None, *, is_first: bool, is_last: bool
) -> Iterator[Row]:
    count = i2 - i1
    head = 0 if is_first else context
    tail = 0 if is_last else context
    if context is None or head is None or tail is None or count <= head + tail + 1:
        head, tail = count, 0
    for n in range(count):
        if n == head and n < count - tail:
            yield Row("gap", hidden=count - head - tail)
        if n < head or n >= count - tail:
            pieces = (Piece(lines[i1 + n]),)
            yield Row("same", Side(i1 + n + 1, pieces), Side(j1 + n + 1, pieces))


def _changed(old: Sequence[str], new: Sequence[str], i1: int, j1: int) -> Iterator[Row]:
    for n in range(max(len(old), len(new))):
        left = old[n] if n < len(old) else None
        right = new[n] if n < len(new) else None
        left_pieces, right_pieces = _words(left, right)
        yield Row(
            "change",
            None if left is None else Side(i1 + n + 1, left_pieces),
            None if right is None else Side(j1 + n + 1, right_pieces),
        )


def _words(left: str | None, right: str | None) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Both lines in pieces, with what differs marked, unless they have little in common."""
    whole = tuple((Piece(line),) if line is not None else () for line in (left, right))
    if left is None or right is None or max(len(left), len(right)) > MAX_WORDS_CHARS:
        return whole[0], whole[1]
    a, b = _WORDS.findall(left), _WORDS.findall(right)
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    if matcher.ratio() < 0.4:
        return whole[0], whole[1]
    before: list[Piece] = []
    after: list[Piece] = []
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if i2 > i1:
            before.append(Piece("".join(a[i1:i2]), tag != "equal"))
        if j2 > j1:
            after.append(Piece("".join(b[j1:j2]), tag != "equal"))
    return tuple(before), tuple(after)


def shifted(rows: Sequence[Row], old: int, new: int | None = None) -> list[Row]:
    """The rows of a part of two texts, numbered as in the whole texts: `old` and `new` lines are before them."""

    def at(side: Side | None, lines: int) -> Side | None:
        return None if side is None else Side(side.number + lines, side.pieces)

    return [
        Row(row.kind, at(row.old, old), at(row.new, old if new is None else new), row.hidden) for row in rows
    ]
