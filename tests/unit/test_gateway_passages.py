"""Blocks of a prompt and the text they stand for: nothing is lost, nothing is told twice."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forepage.errors import RequestError
from forepage.gateway.chat_schemas import ChatBody
from forepage.gateway.conversation import conversation_of
from forepage.gateway.dashboard import PASSAGES_PATH
from forepage.gateway.passages import Passages, passages
from forepage.settings import SEEDED_MODEL
from forepage.text.chat import chat_parts, encode_parts
from forepage.text.dsml import Part
from forepage.text.tokenizer import Tokenizer
from forepage.text.wording import Wording
from rigs.fake_worker import StartWorker
from rigs.gateways import OpenGateway, chat
from rigs.v4_tokenizer import v4_tokenizer

WORDING = Wording.load(SEEDED_MODEL)
SEEDED = Tokenizer.load(SEEDED_MODEL)


def utf16(text: str, start: int, end: int) -> str:
    return text.encode("utf-16-le")[2 * start : 2 * end].decode("utf-16-le")


def layout_of(text: str) -> list[Part]:
    return chat_parts(conversation_of(ChatBody.model_validate(chat(text))), WORDING)


def passages_of(text: str, tokenizer: Tokenizer, block_tokens: int) -> Passages:
    return passages(layout_of(text), text, tokenizer, block_tokens=block_tokens)


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200),
    block_tokens=st.integers(1, 40),
    is_v4=st.booleans(),
)
def test_spans_follow_one_another_and_cover_the_text(text: str, block_tokens: int, is_v4: bool) -> None:
    tokenizer = v4_tokenizer() if is_v4 else SEEDED
    found = passages_of(text, tokenizer, block_tokens)
    ids = encode_parts(layout_of(text), tokenizer)
    assert found.prompt_tokens == len(ids)
    assert len(found.blocks) == -(-len(ids) // block_tokens)
    assert "".join(utf16(text, *span) for span in found.blocks) == text
    end = 0
    for start, stop in found.blocks:
        assert start == end <= stop
        end = stop


@settings(max_examples=30, deadline=None)
@given(text=st.text(st.sampled_from("ab é🙂漢\n"), min_size=1, max_size=120), block_tokens=st.integers(2, 16))
def test_a_character_belongs_to_the_block_of_its_last_byte(text: str, block_tokens: int) -> None:
    """The seeded model's tokens are bytes; two control tokens come before the text."""
    found = passages_of(text, SEEDED, block_tokens)
    expected = [""] * len(found.blocks)
    position = 2
    for char in text:
        position += len(char.encode())
        expected[(position - 1) // block_tokens] += char
    assert [utf16(text, *span) for span in found.blocks] == expected


def test_characters_beyond_the_first_plane_count_twice_as_in_a_browser() -> None:
    text = "🙂" * 30
    found = passages_of(text, SEEDED, 32)
    assert found.blocks[-1][1] == 60


def test_the_question_is_found_behind_earlier_turns() -> None:
    messages = [
        {"role": "user", "content": "first words"},
        {"role": "assistant", "content": "an answer"},
        {"role": "user", "content": "last words"},
    ]
    body = ChatBody.model_validate({"model": "m", "messages": messages})
    parts = chat_parts(conversation_of(body), WORDING)
    found = passages(parts, "last words", SEEDED, block_tokens=8)
    assert "".join(utf16("last words", *span) for span in found.blocks) == "last words"
    assert found.blocks[0] == (0, 0)


def test_a_text_that_was_joined_with_others_is_refused() -> None:
    with pytest.raises(RequestError, match="apart from others"):
        passages(layout_of("some text"), "text", SEEDED, block_tokens=8)


async def test_over_http(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(await start_worker())
    text = "é" * 200
    reply = await gateway.client.post(PASSAGES_PATH, json=chat(text))
    told = Passages.model_validate_json(reply.content)
    assert told.block_tokens == 256
    assert told.blocks[-1][1] == 200
    assert len(told.blocks) == 2
