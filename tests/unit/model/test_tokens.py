"""A session token identifies session and epoch, and cannot be created or changed without the secret."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_hitl_template.errors import ConfigError, InvalidInput, Unauthorized
from claude_hitl_template.model.tokens import PREFIX, check, mint

SECRET = b"0123456789abcdef"


@given(
    session_id=st.text("abcXYZ019_-", min_size=1, max_size=128),
    epoch=st.integers(min_value=0, max_value=2**63),
    secret=st.binary(min_size=16, max_size=64),
)
def test_what_was_minted_is_what_is_read(session_id: str, epoch: int, secret: bytes):
    assert check(secret, mint(secret, session_id, epoch)) == (session_id, epoch)


def test_a_token_is_recognisable_and_fits_into_a_header():
    token = mint(SECRET, "sesn_01AbC", 7)

    assert token.startswith(PREFIX + "sesn_01AbC.7.")
    assert token.isascii()
    assert token.isprintable()
    assert " " not in token


@given(st.text())
def test_any_other_text_is_unauthorized(text: str):
    with pytest.raises(Unauthorized):
        check(SECRET, text)


@given(position=st.integers(min_value=0), replacement=st.characters(min_codepoint=33, max_codepoint=255))
def test_a_token_with_one_other_character_is_unauthorized(position: int, replacement: str):
    token = mint(SECRET, "sesn_1", 41)
    position %= len(token)
    changed = token[:position] + replacement + token[position + 1 :]
    if changed != token:
        with pytest.raises(Unauthorized):
            check(SECRET, changed)


@pytest.mark.parametrize("end", ["", " ", "\n", "0", ".0"])
def test_a_token_cut_short_or_with_something_after_it_is_unauthorized(end: str):
    token = mint(SECRET, "sesn_1", 1)
    with pytest.raises(Unauthorized):
        check(SECRET, token + end if end else token[:-1])


def test_a_token_of_another_secret_is_unauthorized_and_the_error_does_not_repeat_it():
    token = mint(b"another secret, also long", "sesn_1", 1)
    with pytest.raises(Unauthorized) as caught:
        check(SECRET, token)
    assert token not in str(caught.value)


@pytest.mark.parametrize("session_id", ["", "a.b", "a b", "a\n", "é", "x" * 129])
def test_an_id_that_would_make_the_token_ambiguous_is_refused(session_id: str):
    with pytest.raises(InvalidInput, match="session_id"):
        mint(SECRET, session_id, 1)


def test_a_negative_epoch_is_refused():
    with pytest.raises(InvalidInput, match="epoch"):
        mint(SECRET, "sesn_1", -1)


def test_a_short_secret_is_a_fault_of_the_set_up_for_both_sides():
    with pytest.raises(ConfigError, match="16"):
        mint(b"short", "sesn_1", 1)
    with pytest.raises(ConfigError, match="16"):
        check(b"", PREFIX + "sesn_1.1.0000")
