"""Training's chats are what a worker reads and writes: token by token the served layout of the same turns."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np
import pytest
from numpy.typing import NDArray

from forepage.settings import TINY_MODEL
from forepage.suites.registry import SUITES, generate
from forepage.suites.task import Split, Task, Turn, messages
from forepage.text.chat import chat_parts, encode_parts
from forepage.text.control_tokens import ControlToken
from forepage.text.messages import ChatMessage, Conversation, Role
from forepage.text.tokenizer import Tokenizer
from forepage.text.wording import Wording
from forepage.training.backbone.batches import KIND_IDS
from forepage.training.backbone.chats import ChatText, ControlIds, asked, chat_document, quote
from forepage.training.backbone.documents import NO_QUESTION, PAD, Document

TOKENIZER = Tokenizer.load(TINY_MODEL)
WORDING = Wording.load(TINY_MODEL)
IDS = ControlIds()


def some_task(suite: str, split: Split, num_questions: int = 3) -> Task:
    return generate(suite, length_tokens=1200, split=split, seed=11, num_questions=num_questions)


def served_ids(turns: list[Turn]) -> list[int]:
    """A request's prompt, as the gateway encodes it."""
    spoken = [ChatMessage(Role(turn.role), turn.text) for turn in turns]
    return encode_parts(chat_parts(Conversation(spoken), WORDING), TOKENIZER)


def answers(document: Document) -> Iterator[tuple[int, int]]:
    """[begin, end) of every answer, in order."""
    place = 0
    for question, run in groupby(document.questions.tolist()):
        length = len(list(run))
        if question != NO_QUESTION:
            yield place, place + length
        place += length


def text_of(ids: NDArray[np.uint16]) -> str:
    return TOKENIZER.decode_bytes(ids.tolist()).decode()


def test_control_ids_are_the_bundled_tokenizers() -> None:
    names = ("BOS", "EOS", "USER", "ASSISTANT", "END_THINK")
    ours = [getattr(IDS, name.lower()) for name in names]
    assert ours == [TOKENIZER.token_id(ControlToken[name]) for name in names]
    assert TOKENIZER.name_of(PAD) is not None
    assert "pad" in str(TOKENIZER.name_of(PAD))


@pytest.mark.parametrize("split", Split)
@pytest.mark.parametrize("suite", SUITES)
def test_chat_is_token_by_token_what_is_served(suite: str, split: Split) -> None:
    """Each answer follows the very prompt that a request for it would be, earlier answers included."""
    task = some_task(suite, split)
    document = asked(task, 100_000, KIND_IDS[suite]).document()
    turns: list[Turn] = []
    spans = list(answers(document))
    assert len(spans) == len(task.questions)
    for number, (question, (begin, end)) in enumerate(zip(task.questions, spans, strict=True)):
        turns += messages(task, question) if number == 0 else [Turn("user", question.text)]
        assert document.tokens[:begin].tolist() == served_ids(turns)
        assert document.tokens[begin:end].tolist() == [*TOKENIZER.encode_text(question.answer), IDS.eos]
        turns.append(Turn("assistant", question.answer))
    assert spans[-1][1] == document.length


@pytest.mark.parametrize("suite", SUITES)
def test_decisive_tokens_are_an_answers_own(suite: str) -> None:
    document = asked(some_task(suite, Split.TRAIN), 4096, KIND_IDS[suite]).document()
    for begin, end in answers(document):
        assert 1 <= document.decisive[begin:end].sum() < end - begin
        assert not document.decisive[end - 1], "nothing decides the end"
    assert not document.decisive[document.questions == NO_QUESTION].any()
    assert set(document.kinds[document.questions != NO_QUESTION].tolist()) == {KIND_IDS[suite]}


def test_questions_that_do_not_fit_are_left_out_whole() -> None:
    task = some_task("longmemeval", Split.TRAIN)
    whole = asked(task, 100_000, 1).document()
    last = list(answers(whole))[-1]
    cut = asked(task, last[1] - 1, 1).document()
    assert len(list(answers(cut))) == len(task.questions) - 1
    assert cut.length <= last[1] - 1


def test_quotes_go_on_where_the_words_stand_once() -> None:
    task = some_task("longbench", Split.TRAIN, num_questions=1)
    context = "\n".join(turn.text for turn in task.context)
    chat = ChatText(IDS)
    chat.add(np.array([IDS.bos], np.uint16))
    chat.turn("user", context)
    began = chat.length
    quote(chat, context, np.random.default_rng(0), 4096, 9)
    document = chat.document()
    spans = list(answers(document))
    assert len(spans) > 5
    asked_from = began
    for begin, end in spans:
        question, answer = (
            text_of(document.tokens[asked_from:begin]),
            text_of(document.tokens[begin : end - 1]),
        )
        # The words given are the longest part of the question that the context has.
        given = max(
            (
                question[start:stop]
                for start in range(len(question))
                for stop in range(start + 14, len(question) + 1)
                if question[start:stop] in context
            ),
            key=len,
        )
        assert any(context.count(given[:size]) == 1 for size in range(14, len(given) + 1))
        assert given + answer in context
        assert document.decisive[begin : begin + 3].all()
        assert document.decisive[begin:end].sum() == 3
        asked_from = end
    assert document.length <= 4096


@pytest.mark.parametrize("split", Split)
def test_documents_fit_and_only_training_is_quoted(split: Split) -> None:
    draw = np.random.default_rng(3)
    for suite in ("ruler_vt", "longmemeval", "mrcr"):
        document = chat_document(draw, suite, 2048, KIND_IDS, split)
        assert document.length <= 2048
        kinds = set(document.kinds.tolist()) - {0}
        assert KIND_IDS[suite] in kinds
        assert kinds <= {KIND_IDS[suite], KIND_IDS["quotes"] if split is Split.TRAIN else KIND_IDS[suite]}


def test_padding_is_nothing_to_learn_and_too_little_room_is_an_error() -> None:
    document = asked(some_task("mrcr", Split.TRAIN), 4096, 1).document()
    padded = document.padded(document.length + 5)
    assert padded.tokens[-5:].tolist() == [PAD] * 5
    assert padded.questions[-5:].tolist() == [NO_QUESTION] * 5
    assert not padded.kinds[-5:].any()
    with pytest.raises(ValueError, match="doesn't fit"):
        document.padded(document.length - 1)
