"""Laws of reading answers: cutting never matters, nothing raises, no text is lost, calls come back whole."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from forepage.settings import SEEDED_MODEL
from forepage.text.control_tokens import ControlToken
from forepage.text.detokenizer import Detokenizer
from forepage.text.dsml import BEFORE_CALLS, call_parts
from forepage.text.messages import ToolCall
from forepage.text.tokenizer import Tokenizer
from rigs.answers import Gathered, parsed

# ruff: noqa: RUF001
TOKENIZER = Tokenizer.load(SEEDED_MODEL)
LETTERS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="｜"), max_size=12)
WORDS = st.sampled_from("ABCE")  # in no markup
MARKUP = st.sampled_from(
    [
        *(
            "<｜DSML｜tool_calls>",
            "</｜DSML｜tool_calls>",
            "</think>",
            "<think>",
            "\n",
            "\n\n",
            "{",
            '"',
            ">",
            "<",
        ),
        *('<｜DSML｜invoke name="f">', "</｜DSML｜invoke>", "<｜DSML｜invoke ", "</｜DSML｜parameter>"),
        *('<｜DSML｜parameter name="k" string="true">', '<｜DSML｜parameter name="k" string="false">'),
        *('<｜DSML｜parameter name="k">', "<｜DSML｜", '[1, "x"]', "null", '{"a": 1}', "\\", "é🙂"),
    ]
)
SOUP = st.lists(st.one_of(MARKUP, WORDS, MARKUP), max_size=30)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**9), 10**9), st.floats(-1e6, 1e6), LETTERS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(LETTERS, inner, max_size=3)),
    max_leaves=6,
)
NAMES = st.from_regex(r"\A[A-Za-z0-9_.:/-]{1,20}\Z")
KEYS = st.text("abc_ ü", min_size=1, max_size=6)
CALLS = st.builds(
    ToolCall, call_id=st.just(""), name=NAMES, arguments=st.dictionaries(KEYS, JSON, max_size=4)
)


def cut(data: st.DataObject, text: str) -> list[str]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@settings(max_examples=300)
@given(soup=SOUP, data=st.data(), thinking=st.booleans(), complete=st.booleans())
def test_any_cutting_gives_the_same_answer(
    soup: list[str], data: st.DataObject, thinking: bool, complete: bool
) -> None:
    text = "".join(soup)
    whole = parsed([text], thinking=thinking, complete=complete)
    assert parsed(cut(data, text), thinking=thinking, complete=complete) == whole
    assert parsed(text, thinking=thinking, complete=complete) == whole


@settings(max_examples=300)
@given(soup=SOUP, thinking=st.booleans(), complete=st.booleans())
def test_no_word_is_lost(soup: list[str], thinking: bool, complete: bool) -> None:
    """Letters outside of complete markup come out again, all of them, somewhere."""
    found = parsed(["".join(soup)], thinking=thinking, complete=complete)
    shown = found.reasoning + found.content + "".join(arguments for _, arguments in found.calls)
    for letter in "ABCE":
        assert shown.count(letter) == "".join(soup).count(letter)


@given(
    reasoning=LETTERS,
    content=LETTERS.filter(lambda text: not text.endswith("\n")),
    calls=st.lists(CALLS, max_size=3),
    thinking=st.booleans(),
    data=st.data(),
)
def test_what_the_layout_writes_is_read_back(
    reasoning: str, content: str, calls: list[ToolCall], thinking: bool, data: st.DataObject
) -> None:
    """Also through token ids, cut anywhere between bytes."""
    text = reasoning + ControlToken.END_THINK if thinking else ""
    text += content + (BEFORE_CALLS + "".join(call_parts(tuple(calls))) if calls else "")
    if "</think>" in reasoning:
        return
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.feed(piece) for piece in cut_ids(data, ids_of(text))]
    found = parsed([*pieces, detokenizer.finish()], thinking=thinking)
    assert (found.reasoning, found.content) == (reasoning if thinking else "", content)
    assert [name for name, _ in found.calls] == [call.name for call in calls]
    assert found.arguments == [dict(call.arguments) for call in calls]


def ids_of(text: str) -> list[int]:
    ids: list[int] = []
    for index, piece in enumerate(text.split(ControlToken.DSML)):
        ids += [TOKENIZER.token_id(ControlToken.DSML)] if index else []
        ids += TOKENIZER.encode_text(piece)
    return ids


def cut_ids(data: st.DataObject, ids: list[int]) -> list[list[int]]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=12)))
    return [ids[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@given(text=st.text(max_size=60), thinking=st.booleans(), data=st.data())
def test_plain_text_passes_through(text: str, thinking: bool, data: st.DataObject) -> None:
    if "</think>" not in text and "<｜DSML｜tool_calls>" not in text:
        found: Any = parsed(cut(data, text), thinking=thinking)
        assert found == (Gathered(reasoning=text) if thinking else Gathered(content=text))
