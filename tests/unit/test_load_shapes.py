"""Shapes of load: users over time, and the questions they promise, the same for the same seed."""

import random
from collections import Counter
from itertools import islice

import pytest

from loadtest.load.conversation import documents, mostly_recent
from loadtest.load.shapes import PAST_SHARE, SHAPES, TURNS, Shape


def small(name: str, length_tokens: int, num_documents: int = 2) -> Shape:
    return SHAPES[name].scaled(
        seconds=None, users=1.0, length_tokens=length_tokens, num_documents=num_documents
    )


def test_users_follow_the_stages_and_then_the_load_is_over() -> None:
    burst = SHAPES["burst"]
    assert [burst.users_at(at) for at in (0.0, 14.9, 15.0, 29.9, 30.0, 104.9, 105.0)] == [
        2,
        2,
        16,
        16,
        2,
        2,
        None,
    ]
    assert burst.seconds == 105


def test_scaling_keeps_the_form() -> None:
    burst = SHAPES["burst"].scaled(seconds=10.5, users=0.25, length_tokens=None, num_documents=None)
    assert burst.seconds == pytest.approx(10.5)
    assert [stage.users for stage in burst.stages] == [1, 4, 1, 4, 1, 4, 1]  # never nobody
    assert burst.length_tokens == SHAPES["burst"].length_tokens


@pytest.mark.parametrize("name", SHAPES)
def test_the_same_seed_asks_the_same(name: str) -> None:
    shape = small(name, 32_768 if name == "mostly-recent" else 9_000)
    first, again, other = (
        [conversation.opening() for conversation in islice(shape.conversations(seed), 6)]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_one_question_in_ten_needs_the_past() -> None:
    shape = small("mostly-recent", 32_768, num_documents=4)
    asked = [item for one in islice(shape.conversations(3), 1000) for item in one.items]
    share = sum(bool(item.outside_tail) for item in asked) / len(asked)
    assert share == pytest.approx(PAST_SHARE, abs=0.03)
    assert len({item.key for item in asked}) > 20


def test_documents_too_short_for_a_past_are_refused() -> None:
    with pytest.raises(ValueError, match="no questions about older text"):
        next(mostly_recent(documents(4096, count=1, seed=0), random.Random(0), past_share=0.1))


def test_turns_are_different_questions_behind_what_was_said() -> None:
    conversation = next(small("multi-turn", 4096).conversations(0))
    assert len({item.question.text for item in conversation.items}) == len(conversation.items) == TURNS
    said = conversation.opening()
    later = conversation.follow_up(1, said, "It is 7.")
    assert later[: len(said)] == said
    assert later[len(said) :] == [
        {"role": "assistant", "content": "It is 7."},
        {"role": "user", "content": conversation.items[1].question.text},
    ]


def test_mixed_lengths_move_as_many_tokens_each() -> None:
    shape = small("mixed", 65_536, num_documents=1)
    counts = Counter(one.items[0].length_tokens for one in islice(shape.conversations(5), 3000))
    assert sorted(counts) == [8192, 16_384, 32_768, 65_536]
    moved = [length * count for length, count in counts.items()]
    assert max(moved) / min(moved) < 1.4


def test_the_longest_mixed_prompt_leaves_room_in_a_million_tokens() -> None:
    longest = SHAPES["mixed"].length_tokens
    [document] = documents(longest, count=1, seed=1, per_document=1)
    item = document.items[0]
    prompt_chars = sum(len(turn.text) for turn in item.turns)
    assert prompt_chars > 1_000_000
    assert prompt_chars + item.max_tokens + 256 <= 1 << 20, "with the frame around the turns"
