"""The shapes of load: how many users when, and what they ask. A shape is a value; nothing here sends."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from loadtest.load.conversation import Conversation, documents, many_turns, mostly_recent, single_questions

PAST_SHARE = 0.1
MIXED_FROM_TOKENS = 8192
MIXED_TO_TOKENS = (1 << 20) - 1024
"""The model's 1M tokens hold the prompt's frame and the answer, too."""
TURNS = 8


@dataclass(frozen=True)
class Stage:
    """So many users until `seconds` more have passed."""

    seconds: float
    users: int


@dataclass(frozen=True)
class Shape:
    """One scenario.

    length_tokens: the longest document; think_s: a user's pause before each question; budget_blocks: what is
    asked for where the command line does not say (None: the server's), so that short documents are paged too.
    """

    name: str
    what: str
    stages: tuple[Stage, ...]
    length_tokens: int
    num_documents: int
    think_s: float
    ask: Callable[["Shape", random.Random], Iterator[Conversation]]
    budget_blocks: int | None = None

    @property
    def seconds(self) -> float:
        """How long it takes, without the answers still under way at the end."""
        return sum(stage.seconds for stage in self.stages)

    def scaled(
        self, *, seconds: float | None, users: float, length_tokens: int | None, num_documents: int | None
    ) -> "Shape":
        """The same shape of another duration, number of users, document length and count."""
        factor = 1.0 if seconds is None else seconds / self.seconds
        stages = tuple(
            Stage(stage.seconds * factor, max(1, round(stage.users * users))) for stage in self.stages
        )
        return replace(
            self,
            stages=stages,
            length_tokens=length_tokens or self.length_tokens,
            num_documents=num_documents or self.num_documents,
        )

    def users_at(self, elapsed_s: float) -> int | None:
        """How many users there are then; None when the load is over."""
        for stage in self.stages:
            if elapsed_s < stage.seconds:
                return stage.users
            elapsed_s -= stage.seconds
        return None

    def conversations(self, seed: int) -> Iterator[Conversation]:
        """What users ask, one conversation after the other; the same for the same seed."""
        return self.ask(self, random.Random(seed))


def _single(shape: Shape, rng: random.Random) -> Iterator[Conversation]:
    seed = rng.randrange(1 << 30)
    return single_questions(documents(shape.length_tokens, count=shape.num_documents, seed=seed), rng)


def _mostly_recent(shape: Shape, rng: random.Random) -> Iterator[Conversation]:
    seed = rng.randrange(1 << 30)
    found = documents(shape.length_tokens, count=shape.num_documents, seed=seed)
    return mostly_recent(found, rng, past_share=PAST_SHARE)


def _many_turns(shape: Shape, rng: random.Random) -> Iterator[Conversation]:
    seed = rng.randrange(1 << 30)
    found = documents(shape.length_tokens, count=shape.num_documents, seed=seed)
    return many_turns(found, rng, turns=TURNS)


def _mixed(shape: Shape, rng: random.Random) -> Iterator[Conversation]:
    """Lengths double from 8K; one twice as long comes half as often, so every length moves as many tokens."""
    lengths = [MIXED_FROM_TOKENS]
    while lengths[-1] < shape.length_tokens:
        lengths.append(min(lengths[-1] * 2, shape.length_tokens))
    sources = {
        length: single_questions(
            documents(length, count=shape.num_documents, seed=rng.randrange(1 << 30)), rng
        )
        for length in lengths
    }
    while True:
        [length] = rng.choices(lengths, weights=[1 / length for length in lengths])
        yield next(sources[length])


_BURST = (Stage(15, 2), Stage(15, 16))
SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="ci",
            what="a short look: two users, documents of 4K tokens",
            stages=(Stage(30, 2),),
            length_tokens=4096,
            num_documents=2,
            think_s=0.1,
            ask=_single,
            budget_blocks=4,
        ),
        Shape(
            name="mostly-recent",
            what="90 % of the questions can be answered from the last 8K tokens, 10 % need the past",
            stages=(Stage(300, 8),),
            length_tokens=65_536,
            num_documents=16,
            think_s=1.0,
            ask=_mostly_recent,
        ),
        Shape(
            name="multi-turn",
            what=f"{TURNS} questions one after the other on one long document",
            stages=(Stage(300, 8),),
            length_tokens=131_072,
            num_documents=8,
            think_s=2.0,
            ask=_many_turns,
        ),
        Shape(
            name="burst",
            what="2 users, then 16 at once, and again: what waits, what is refused, how it recovers",
            stages=(*_BURST, *_BURST, *_BURST, Stage(15, 2)),
            length_tokens=16_384,
            num_documents=16,
            think_s=0.5,
            ask=_single,
        ),
        Shape(
            name="mixed",
            what="documents of 8K to 1M tokens together, each length moving as many tokens",
            stages=(Stage(600, 8),),
            length_tokens=MIXED_TO_TOKENS,
            num_documents=4,
            think_s=1.0,
            ask=_mixed,
        ),
    )
}
