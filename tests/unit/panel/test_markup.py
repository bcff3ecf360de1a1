"""Text from others is never markup."""

import pytest
from hypothesis import given

from claude_hitl_template.panel.markup import inert
from claude_hitl_template.presentation.html import markdown, text
from tests.unit.panel.components import diff, facts, fold, line, shortened
from tests.unit.panel.html import Reader
from tests.unit.panel.nasty import PAYLOADS, texts


@given(texts)
def test_text_adds_no_markup_but_marks(given_text: str) -> None:
    for write in (text, line, shortened, lambda said: facts([(said, said)]), lambda said: fold(said, "")):
        Reader(write(given_text)).check()
    assert {tag for tag, _ in Reader(text(given_text)).elements} <= {"b"}


@given(texts, texts)
def test_a_diff_shows_both_texts_and_no_markup_of_theirs(old: str, new: str) -> None:
    Reader(diff(old, new)).check()


@given(texts)
def test_markdown_keeps_raw_html_pictures_and_scripts_out(given_text: str) -> None:
    reader = Reader(markdown(given_text))
    reader.check()
    assert not {"img", "script", "iframe"} & {tag for tag, _ in reader.elements}


@pytest.mark.parametrize(
    "address",
    ["javascript:alert(1)", "JaVaScRiPt:x", "data:text/html,x", "vbscript:x", "file:///x", "//evil"],
)
def test_markdown_links_lead_only_where_a_link_may(address: str) -> None:
    assert "<a " not in markdown(f"[x]({address}) <{address}>")


def test_markdown_is_read_as_markdown() -> None:
    shown = markdown("# T\n\n- **a** `b`\n\n```py\nx < 1\n```\n\n[l](https://a.b/?x=1&y=2)")
    for part in ("<h1>T</h1>", "<strong>a</strong>", "<code>b</code>", "<pre>x &lt; 1</pre>"):
        assert part in shown
    assert 'href="https://a.b/?x=1&amp;y=2"' in shown


def test_an_entity_that_stands_for_a_hidden_character_is_shown_as_an_escape() -> None:
    assert "\u202e" not in markdown("&#x202e;gnp.exe")
    assert "\\u202e" in Reader(markdown("&#x202e;gnp.exe")).text


@given(texts)
def test_hidden_characters_never_reach_a_page(given_text: str) -> None:
    for html in (text(given_text), markdown(given_text)):
        assert not set("\u202e\u2066\x1b\x00\ufeff\u2028\r") & set(html)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_an_inert_name_is_text_even_where_nobody_escapes(payload: str) -> None:
    assert not set("<>&\"'`\n\x1b\u202e{}[]$") & set(inert(payload, 80))
    assert len(inert(payload * 20, 80)) <= 80


def test_a_long_text_is_shortened_with_all_of_it_behind_a_fold() -> None:
    long = "\n".join(f"line {n}" for n in range(100))
    shown = shortened(long)
    assert shown.count("line 5\n") == 2
    assert shown.count("line 99") == 1
    assert "100 lines" in shown
    assert "<details" not in shortened("short")
