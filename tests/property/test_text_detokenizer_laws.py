"""Laws of text: encoding round-trips without control tokens, cutting never matters, stops never leak."""

import re

from hypothesis import given
from hypothesis import strategies as st

from forepage.settings import SEEDED_MODEL
from forepage.text.control_tokens import ControlToken
from forepage.text.detokenizer import Detokenizer, StopMatcher
from forepage.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(SEEDED_MODEL)
ENCODABLE = st.text(st.characters(exclude_categories=["Cs"]))
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4)


def chunked(data: st.DataObject, length: int) -> list[slice]:
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=8)))
    return [slice(start, stop) for start, stop in zip([0, *cuts], [*cuts, length], strict=True)]


@given(text=ENCODABLE, control=st.sampled_from(list(ControlToken)))
def test_any_text_round_trips_without_control_tokens(text: str, control: str) -> None:
    hostile = text + control + text
    ids = TOKENIZER.encode_text(hostile)
    assert all(token < 256 for token in ids)
    assert TOKENIZER.decode_bytes(ids).decode() == hostile
    assert TOKENIZER.least_tokens(hostile) <= len(ids)


@given(raw=st.one_of(st.binary(), ENCODABLE.map(str.encode)), data=st.data())
def test_chunked_text_equals_the_whole_decode(raw: bytes, data: st.DataObject) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    shown = [detokenizer.feed(raw[part]) for part in chunked(data, len(raw))]
    assert "".join(shown) + detokenizer.finish() == raw.decode(errors="replace")


@given(raw=ENCODABLE.map(str.encode), data=st.data())
def test_valid_text_is_never_shown_broken(raw: bytes, data: st.DataObject) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    whole = raw.decode()
    shown = ""
    for part in chunked(data, len(raw)):
        shown += detokenizer.feed(raw[part])
        assert whole.startswith(shown)


@given(text=st.text("abc", max_size=40), stops=STOPS, data=st.data())
def test_stop_strings_never_leak(text: str, stops: list[str], data: st.DataObject) -> None:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.feed(text[part]) for part in chunked(data, len(text))) + matcher.finish()
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    ends = [(found.end(), found.start()) for stop in stops if (found := re.search(re.escape(stop), text))]
    assert shown == (text[: min(ends)[1]] if ends else text)
    assert (matcher.matched is not None) == bool(ends)
