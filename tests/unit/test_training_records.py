"""Record documents: what is asked for is told, once, in the first half; what counts can be known."""

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from forepage.training.backbone.documents import NO_QUESTION, Document
from forepage.training.backbone.records import (
    MIN_KEY,
    MIN_VALUE,
    UNSURE,
    WIDTHS,
    _Records,
    record_document,
)

KIND = 1
LENGTHS = (512, 1024, 4096, 16384)


def documents(length: int, count: int) -> Iterator[Document]:
    for seed in range(count):
        yield record_document(np.random.default_rng(seed), length, KIND)


def answers(document: Document) -> Iterator[slice]:
    """Where each question's answer lies."""
    for number in np.unique(document.questions[document.questions != NO_QUESTION]):
        places = np.flatnonzero(document.questions == number)
        assert (np.diff(places) == 1).all()
        yield slice(int(places[0]), int(places[-1]) + 1)


def occurrences(tokens: NDArray[np.uint16], wanted: NDArray[np.uint16]) -> list[int]:
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(wanted))
    found: list[int] = np.flatnonzero((windows == wanted).all(1)).tolist()
    return found


def width_of(document: Document) -> int:
    """Every answer lies within the slot that its question is numbered by."""
    places = np.flatnonzero(document.questions != NO_QUESTION)
    (width,) = (width for width in WIDTHS if (places // width == document.questions[places]).all())
    return width


def first_half(document: Document) -> NDArray[np.uint16]:
    """What stands before the first slot in which anything may be asked."""
    width = width_of(document)
    return document.tokens[: document.length // width // 2 * width]


def asking(document: Document, begin: int) -> NDArray[np.uint16]:
    """The longest run of tokens before an answer that the first half has: a reader's best clue."""
    told, size = first_half(document), 1
    while len(occurrences(told, document.tokens[begin - size - 1 : begin])):
        size += 1
    return document.tokens[begin - size : begin]


@pytest.mark.parametrize("length", LENGTHS)
def test_an_answer_is_what_the_first_half_tells_of_its_key_and_nothing_else_is(length: int) -> None:
    """A copied span is told too, but its first symbols need not say which one is meant."""
    asked = copied = 0
    for document in documents(length, 40 if length < 4096 else 4):
        told, width = first_half(document), width_of(document)
        for place in answers(document):
            value = document.tokens[place]
            assert document.decisive[place].tolist() == [at < MIN_VALUE for at in range(len(value))]
            if (place.start - UNSURE) % width == 0 and place.stop % width == 0:
                copied += 1
                assert occurrences(told, document.tokens[place.start - UNSURE : place.stop])
                continue
            asked += 1
            clue = asking(document, place.start)
            assert len(clue) >= MIN_KEY + 2, "mark, key and separator at least"
            values = {told[end : end + len(value)].tobytes() for end in ends(told, clue)}
            assert values == {value.tobytes()}
    assert asked > 50
    assert copied > 20


def ends(tokens: NDArray[np.uint16], wanted: NDArray[np.uint16]) -> list[int]:
    return [begin + len(wanted) for begin in occurrences(tokens, wanted)]


@pytest.mark.parametrize("length", LENGTHS)
def test_documents_have_the_asked_length_and_answers_in_the_second_half(length: int) -> None:
    for document in documents(length, 6):
        assert document.length == length
        asked = np.flatnonzero(document.kinds == KIND)
        assert asked.min() >= len(first_half(document))
        assert set(document.kinds.tolist()) == {0, KIND}
        assert len(first_half(document)) > length // 2 - max(WIDTHS)


@pytest.mark.parametrize("seed", range(4))
def test_keys_differ_and_half_of_them_in_one_symbol(seed: int) -> None:
    """What makes a lookup need more than the first symbols of a key."""
    draw = np.random.default_rng(seed)
    records = _Records(draw, 256, 64)
    keys = [
        tuple(key[:length]) for key, length in zip(records._keys, records._key_lengths.tolist(), strict=True)
    ]
    assert len(set(keys)) == len(keys)
    near = sum(
        any(
            len(other) == len(key) and sum(a != b for a, b in zip(key, other, strict=True)) == 1
            for other in keys
        )
        for key in keys
    )
    assert near > 0.4 * len(keys)
