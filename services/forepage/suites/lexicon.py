"""The words of one split: every list is cut in two, so that training never sees a word or name of the test.

A word belongs to the test if its CRC-32 is a multiple of 3; the same rule sorts the made-up words.
"""

from dataclasses import dataclass
from functools import lru_cache
from zlib import crc32

from forepage.suites.task import Split
from forepage.suites.wording.nouns import NOUNS
from forepage.suites.wording.words import ADJECTIVES, FIRST_NAMES, OCCUPATIONS, VERBS

TEST_SHARE = 3
"""One word in this many belongs to the test."""


def split_of(word: str) -> Split:
    """Which split owns a word, whatever its case."""
    return Split.TEST if crc32(word.lower().encode()) % TEST_SHARE == 0 else Split.TRAIN


@dataclass(frozen=True)
class Lexicon:
    """The words that one split may use. No list is empty; none shares a word with the other split's."""

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]
    first_names: tuple[str, ...]
    occupations: tuple[str, ...]


@lru_cache(maxsize=2)
def lexicon(split: Split) -> Lexicon:
    """The lists of a split; a word that is in two lists is in the same split in both."""

    def own(words: list[str]) -> tuple[str, ...]:
        return tuple(sorted({word for word in words if split_of(word) is split}))

    return Lexicon(own(NOUNS), own(ADJECTIVES), own(VERBS), own(FIRST_NAMES), own(OCCUPATIONS))
