"""Items: what a request has, and in which blocks of the server its evidence lies."""

import pytest

from forepage.settings import SEEDED_MODEL
from forepage.suites.task import Turn
from forepage.text.chat import chat_parts, encode_parts
from forepage.text.messages import ChatMessage, Conversation, Role
from forepage.text.tokenizer import Tokenizer
from forepage.text.wording import Wording
from loadtest.quality.items import BLOCK_TOKENS, TAIL_TOKENS, Item, generated


def token_ids(turns: tuple[Turn, ...]) -> list[int]:
    """The prompt as the gateway encodes it for the bundled model."""
    tokenizer = Tokenizer.load(SEEDED_MODEL)
    conversation = Conversation(tuple(ChatMessage(Role(turn.role), turn.text) for turn in turns))
    return encode_parts(chat_parts(conversation, Wording.load(SEEDED_MODEL)), tokenizer)


def items(suite: str, *, length: int = 12_000, count: int = 6) -> list[Item]:
    documents = generated(suite, length, num_questions=count, per_document=4, first_seed=3)
    return [item for document in documents for item in document.items]


@pytest.mark.parametrize("suite", ["ruler_niah_single_2", "longmemeval", "mrcr", "ruler_qa_2"])
def test_evidence_blocks_are_those_of_the_served_tokens(suite: str) -> None:
    for item in items(suite):
        ids = token_ids(item.turns)
        assert len(ids) == item.byte_tokens
        held = b"".join(
            bytes(token for token in ids[block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS] if token < 256)
            for block in item.evidence_blocks
        )
        if item.question.kind.startswith(("niah", "qa", "mrcr")):
            assert all(fact.encode() in held for fact in item.question.expected[-1:])
        assert (item.depth is None) == (item.evidence_blocks == ())


def test_prompt_and_answer_fit_the_length() -> None:
    for item in items("longbench"):
        assert len(token_ids(item.turns)) + len(item.question.answer) <= 12_000


def test_questions_are_as_many_as_asked_and_have_keys_of_their_own() -> None:
    found = items("ruler_niah_multikey_1", count=10)
    assert len(found) == 10
    assert len({item.key for item in found}) == 10
    assert [item.number for item in found] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_tail_is_measured_from_the_end_of_the_context() -> None:
    for item in items("ruler_niah_single_1", length=20_000, count=16):
        assert item.depth is not None
        after = (1 - item.depth) * 20_000
        if abs(after - TAIL_TOKENS) > 500:
            assert item.outside_tail == (after > TAIL_TOKENS)


def test_good_answer_scores_one_and_fits_the_limit() -> None:
    for item in items("ruler_vt"):
        assert item.score(item.question.answer) == 1.0
        assert item.score("no idea") == 0.0
        assert len(item.question.answer) < item.max_tokens
