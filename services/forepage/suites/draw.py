"""Every random choice of a task: one seeded stream, and the words of one split.

`random.Random` seeded with text is the same on every machine and Python; nothing here uses `hash()`.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from random import Random
from typing import TypeVar

from forepage.suites.lexicon import Lexicon, lexicon, split_of
from forepage.suites.task import Split
from forepage.suites.wording.words import CODAS, ONSETS, VOWELS

T = TypeVar("T")
HEARD_SHARE = 0.4
"""Of training, said in the ways of the test."""
HEX = "0123456789abcdef"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Draw:
    """Draws words, names, numbers and choices for one task."""

    def __init__(self, seed: str, split: Split) -> None:
        self.split = split
        self._random = Random(seed).random

    @cached_property
    def words(self) -> Lexicon:
        """The lists of the split."""
        return lexicon(self.split)

    @property
    def training(self) -> bool:
        """Whether the task is for training."""
        return self.split is Split.TRAIN

    def unit(self) -> float:
        """Uniform in [0, 1)."""
        return self._random()

    def chance(self, share: float) -> bool:
        """True in this share of draws."""
        return self._random() < share

    def below(self, bound: int) -> int:
        """Uniform in 0..bound-1."""
        return int(self._random() * bound)

    def between(self, low: int, high: int) -> int:
        """Uniform in low..high, both possible."""
        return low + int(self._random() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[int(self._random() * len(items))]

    def wording(self, tables: Mapping[str, T]) -> T:
        """How something is said: one of two tables of the suites' wording."""
        return tables[(Split.TEST if self.says_as_test() else Split.TRAIN).value]

    def says_as_test(self) -> bool:
        """Whether to use the test's phrases. Training hears them too: a small model has no other teacher.

        What stays apart are words, names, attributes and seeds (`lexicon.py`): all that is looked up.
        """
        return not self.training or self.chance(HEARD_SHARE)

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in random order."""
        order = list(items)
        for last in range(len(order) - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """`count` distinct places of the items, in random order; all of them where there are fewer."""
        if count * 3 > len(items):
            return self.shuffled(items)[:count]
        places: dict[int, None] = {}
        while len(places) < count:
            places[self.below(len(items))] = None
        return [items[place] for place in places]

    def made_up(self, syllables: int = 2) -> str:
        """A word that no dictionary has, of the split's own."""
        while True:
            word = "".join(self.pick(ONSETS) + self.pick(VOWELS) + self.pick(CODAS) for _ in range(syllables))
            if split_of(word) is self.split:
                return word

    def noun(self) -> str:
        """A common thing."""
        return self.pick(self.words.nouns)

    def adjective(self) -> str:
        """What a thing is like."""
        return self.pick(self.words.adjectives)

    def surname(self) -> str:
        """A made-up family name."""
        return self.made_up(2).capitalize()

    def person(self) -> str:
        """First name and family name."""
        return f"{self.pick(self.words.first_names)} {self.surname()}"

    def place(self) -> str:
        """A made-up town."""
        return self.made_up(self.between(2, 3)).capitalize()

    def digits(self, count: int) -> str:
        """A number of so many digits, the first not 0."""
        return str(self.between(10 ** (count - 1), 10**count - 1))

    def letters(self, count: int) -> str:
        """Random capitals."""
        return "".join([self.pick(LETTERS) for _ in range(count)])

    def uuid(self) -> str:
        """Random lower-case hexadecimal in the 8-4-4-4-12 form, version 4."""
        text = "".join([self.pick(HEX) for _ in range(30)])
        return f"{text[:8]}-{text[8:12]}-4{text[12:15]}-{self.pick('89ab')}{text[15:18]}-{text[18:30]}"
