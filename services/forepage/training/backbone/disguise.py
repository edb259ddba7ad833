"""A task with many of its words exchanged for made-up ones: what is looked up must be read, not known.

The suites' lists hold some hundred words of each sort. A model that is trained on them alone learns them by
heart and then fails on the words of the test. A word is exchanged for one of the same length, the same one
wherever it stands in the task, so the task's layout, and what is right to answer, stay.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np

from forepage.suites.lexicon import lexicon
from forepage.suites.task import Question, Split, Task
from forepage.suites.wording.needles import ATTRIBUTES, KINDS

WORD = re.compile(r"[A-Za-z]{3,}")
CONSONANTS, VOWELS, LETTERS = "bcdfghjklmnpqrstvwxz", "aeiouy", "abcdefghijklmnopqrstuvwxyz"
SPOKEN_SHARE = 0.6
"""Of made-up words, with consonants and vowels in turn; the others are any letters."""
MIN_SHARE = 0.3


def disguised(task: Task, draw: np.random.Generator) -> Task:
    """The task in other words: a share of the listed ones, drawn for each task."""
    share = draw.uniform(MIN_SHARE, 1.0)
    other_of: dict[str, str] = {}

    def exchanged(match: re.Match[str]) -> str:
        word = match.group()
        stem = _stem(word.lower())
        if stem is None:
            return word
        if stem not in other_of:
            other_of[stem] = _made_up(draw, len(stem)) if draw.random() < share else stem
        return _cased(other_of[stem] + word.lower()[len(stem) :], word)

    def said(text: str) -> str:
        return WORD.sub(exchanged, text)

    return replace(
        task,
        context=tuple(replace(turn, text=said(turn.text)) for turn in task.context),
        questions=tuple(_asked(question, said) for question in task.questions),
    )


def _asked(question: Question, said: Callable[[str], str]) -> Question:
    expected = tuple(map(said, question.expected))
    # A code runs into the text behind it, which then is no word of its own.
    is_joined = question.answer == "".join(question.expected)
    answer = "".join(expected) if is_joined else said(question.answer)
    return replace(question, text=said(question.text), answer=answer, expected=expected)


@cache
def _listed() -> frozenset[str]:
    """Words of training's lists that mean nothing to a task beyond themselves, lower case."""
    words = lexicon(Split.TRAIN)
    attributes = {part for names in ATTRIBUTES["train"].values() for name in names for part in name.split()}
    kept = {word for names in KINDS.values() for word in names} | {"special", "magic", "part", "order"}
    lists = (words.nouns, words.adjectives, words.first_names, words.occupations)
    return frozenset(word.lower() for sort in lists for word in sort) | (attributes - kept)


def _stem(word: str) -> str | None:
    """The listed word that this one is, or is the regular plural of."""
    listed = _listed()
    if word in listed:
        return word
    return word[:-1] if word[-1] == "s" and word[:-1] in listed else None


def _made_up(draw: np.random.Generator, length: int) -> str:
    places = draw.integers(1 << 30, size=length)
    if draw.random() >= SPOKEN_SHARE:
        return "".join(LETTERS[place % len(LETTERS)] for place in places)
    turn = int(draw.integers(2))
    sorts = [CONSONANTS if (idx + turn) % 2 else VOWELS for idx in range(length)]
    return "".join(sort[place % len(sort)] for sort, place in zip(sorts, places, strict=True))


def _cased(word: str, like: str) -> str:
    if like.isupper():
        return word.upper()
    return word.capitalize() if like[0].isupper() else word
