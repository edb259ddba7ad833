"""Incremental text: whole characters, stop strings cut off, the same however the ids are cut."""

import pytest

from forepage.settings import SEEDED_MODEL
from forepage.text.detokenizer import Detokenizer, StopMatcher
from forepage.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(SEEDED_MODEL)


def test_character_is_held_until_it_is_complete(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    shown = [detokenizer.feed([byte]) for byte in "a🙂b".encode()]
    assert shown == ["a", "", "", "", "🙂", "b"]
    assert detokenizer.finish() == ""


def test_broken_bytes_become_replacements_once_they_are_hopeless(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.feed([0xF0, 0x9F]) == ""
    assert detokenizer.feed([0x41]) == "\ufffdA"
    assert detokenizer.feed([0xFF]) == "\ufffd"
    assert detokenizer.feed([0xE2, 0x82]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_stop_string_across_tokens_is_cut_off(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, ["END"])
    shown = [detokenizer.feed([byte]) for byte in b"aEbENDc"]
    assert "".join(shown) == "aEb"
    assert shown[1] == ""
    assert detokenizer.stopped
    assert detokenizer.num_tokens == 6
    assert detokenizer.finish() == ""


def test_tokens_behind_the_stop_do_not_count(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, ["b"])
    assert detokenizer.feed(b"abcd") == "a"
    assert detokenizer.num_tokens == 2


def test_stop_token_counts_but_has_no_text(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, stop_tokens=[ord("b")])
    assert detokenizer.feed(b"ab") == "a"
    assert (detokenizer.num_tokens, detokenizer.saw_stop_token, detokenizer.stopped) == (2, True, False)


def test_held_text_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, ["xyz"])
    assert detokenizer.feed(b"wxy") == "w"
    assert detokenizer.finish() == "xy"
    assert not detokenizer.stopped


def test_first_complete_stop_wins_and_the_longest_of_those() -> None:
    matcher = StopMatcher(["abcd", "bc", "xbc"])
    assert matcher.feed("abcd") == "a"
    assert matcher.matched == "bc"
    matcher = StopMatcher(["bc", "xbc"])
    assert matcher.feed("axbcd") == "a"
    assert matcher.matched == "xbc"
    assert matcher.feed("more") == ""


def test_empty_stops_match_nothing() -> None:
    matcher = StopMatcher([""])
    assert matcher.feed("abc") == "abc"
