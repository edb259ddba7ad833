"""What one user asks: a document and a question about it, then more questions on the same document."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loadtest.quality.items import TAIL_TOKENS, Document, Item, generated

Message = dict[str, str]
SUITE = "ruler_niah_multikey_1"
"""Many named values in one long text, so a document has questions for every depth."""
PER_DOCUMENT = 16


@dataclass(frozen=True)
class Conversation:
    """Questions on one document, asked one after the other; each is put behind the answers so far."""

    items: tuple[Item, ...]

    def opening(self) -> list[Message]:
        """The messages of the first question."""
        return [{"role": turn.role, "content": turn.text} for turn in self.items[0].turns]

    def follow_up(self, number: int, said: Sequence[Message], answer: str) -> list[Message]:
        """The messages of question `number`, after `answer` to those before."""
        return [
            *said,
            {"role": "assistant", "content": answer},
            {"role": "user", "content": self.items[number].question.text},
        ]


def documents(
    length_tokens: int, *, count: int, seed: int, per_document: int = PER_DOCUMENT
) -> list[Document]:
    """So many documents with `per_document` questions each."""
    return list(
        generated(
            SUITE,
            length_tokens,
            num_questions=count * per_document,
            per_document=per_document,
            first_seed=seed,
        )
    )


def single_questions(found: Sequence[Document], rng: random.Random) -> Iterator[Conversation]:
    """One question each, on the documents in turn, for ever."""
    while True:
        for document in found:
            yield Conversation((rng.choice(document.items),))


def mostly_recent(
    found: Sequence[Document], rng: random.Random, *, past_share: float
) -> Iterator[Conversation]:
    """Single questions, `past_share` of them on text older than the last 8K tokens, the others on newer.

    Raises: ValueError where the documents have none of either kind.
    """
    items = [item for document in found for item in document.items]
    past = [item for item in items if item.outside_tail]
    recent = [item for item in items if item.outside_tail is False]
    if not past or not recent:
        raise ValueError(
            f"no questions about {'older' if recent else 'newer'} text: documents must be longer than "
            f"{2 * TAIL_TOKENS} tokens, and there must be several"
        )
    while True:
        yield Conversation((rng.choice(past if rng.random() < past_share else recent),))


def many_turns(found: Sequence[Document], rng: random.Random, *, turns: int) -> Iterator[Conversation]:
    """`turns` different questions on one document, in turn over the documents, for ever."""
    while True:
        for document in found:
            yield Conversation(tuple(rng.sample(document.items, min(turns, len(document.items)))))
