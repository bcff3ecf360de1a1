"""Tables of a command's output."""

from collections.abc import Iterable, Sequence

import typer

from claude_hitl_template.cli.common import table_width

MIN_LAST_COLUMN = 20  # with less room, a table gives up other columns first


def print_table(
    rows: Iterable[Sequence[str]], heads: Sequence[str], *, optional: Sequence[str] = (), folded: int = 1
) -> None:
    """Prints `table_lines` in the width of the terminal, or whole where output is not one."""
    typer.echo("\n".join(table_lines(rows, heads, table_width(), optional=optional, folded=folded)))


def table_lines(
    rows: Iterable[Sequence[str]],
    heads: Sequence[str],
    width: int | None = None,
    *,
    optional: Sequence[str] = (),
    folded: int = 1,
) -> list[str]:
    """Rows in columns. Hidden characters are escapes already; the last column is not padded.

    Args:
        rows: The cells.
        heads: The columns' names.
        width: Of the terminal; None for output that a pipe may read, which is left whole.
        optional: Columns that are left out where it is narrow, in this order.
        folded: How many of the last columns are put on a second line where that is not enough.
    """
    whole = [tuple(heads), *(tuple(row) for row in rows)]
    if width is None or max(map(len, _columns(whole))) <= width:
        return _columns(whole)
    for name in ("", *optional):
        if name:
            left_out = whole[0].index(name)
            whole = [row[:left_out] + row[left_out + 1 :] for row in whole]
        lines = _columns(whole)
        last = max(len(line) - len(row[-1]) for line, row in zip(lines, whole, strict=True))
        if width - last >= MIN_LAST_COLUMN:
            return [_cut(line, width) for line in lines]
    pairs = zip(_columns([row[:-folded] for row in whole]), (row[-folded:] for row in whole), strict=True)
    return [
        _cut(line, width)
        for first, rest in pairs
        for line in (first, f"  {'  '.join(rest)}".rstrip())
        if line
    ]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else f"{line[: max(width - 1, 0)]}…"
