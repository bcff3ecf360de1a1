"""The terminal shows exactly what runs: characters that a terminal would hide or act on are escaped."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from claude_hitl_template.presentation.terminal import shown
from claude_hitl_template.presentation.text import one_line, visible


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("naïve 日本 ✓", "naïve 日本 ✓"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("a\rb", "a\\x0db"),
        ("\x7f\x9b", "\\x7f\\x9b"),
        ("rm \u202e/ fr-", "rm \\u202e/ fr-"),
        ("a\u200bb\ufeffc\u2066", "a\\u200bb\\ufeffc\\u2066"),
        ("a\xa0b\u3000c", "a\\xa0b\\u3000c"),
        ("a\u2028b\u2029c", "a\\u2028b\\u2029c"),
        ("\ue000\ud800", "\\ue000\\ud800"),
        ("\u3164\ufe0f\u034f", "\\u3164\\ufe0f\\u034f"),
        ("\U000e0041", "\\U000e0041"),
        ("\0", "\\x00"),
    ],
)
def test_hidden_characters_become_escapes(text: str, seen: str) -> None:
    assert visible(text) == seen
    assert shown(text).plain == seen


@given(st.text(st.characters(exclude_categories=())))
def test_nothing_that_acts_on_a_terminal_is_left(text: str) -> None:
    left = {unicodedata.category(char) for char in visible(text) if char not in "\n\t"}
    assert not left & {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}
    assert visible(text) == shown(text).plain


def test_markup_is_shown_and_not_interpreted() -> None:
    console = Console(width=80, record=True, force_terminal=True)
    console.print(shown("[red]allow[/red] [link=http://x]y[/link] :smile:"))
    assert console.export_text().strip() == "[red]allow[/red] [link=http://x]y[/link] :smile:"


def test_an_escape_looks_different_from_text_that_spells_one() -> None:
    real, spelled = shown("\x1b"), shown("\\x1b")
    assert real.plain == spelled.plain
    assert real.spans
    assert not spelled.spans


def test_one_line_is_short_and_has_no_line_breaks() -> None:
    assert one_line("  a\n\n b\tc ", 80) == "a b c"
    assert one_line("x" * 500, 10) == "x" * 9 + "…"
    assert one_line("\x1b" * 50, 10) == "\\x1b\\x1b\\…"
