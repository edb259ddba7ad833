"""What is asked: one request with its right answer, from a generated suite or a published file."""

from collections.abc import Iterator
from dataclasses import dataclass

from forepage.suites.grading import grade
from forepage.suites.layout import ASSISTANT_CONTROLS, USER_CONTROLS, chat_tokens
from forepage.suites.registry import generate
from forepage.suites.task import (
    Evidence,
    Question,
    Split,
    Task,
    Turn,
    evidence_depth,
    messages,
    outside_last,
)

TAIL_TOKENS = 8192
"""Questions are told apart by whether all their evidence is older than this."""

BLOCK_TOKENS = 256
ANSWER_SLACK = 32
"""Tokens that an answer may be longer than the good one."""


@dataclass(frozen=True)
class Item:
    """One question of one document.

    depth: mean place of the evidence, 0..1; outside_tail: whether all of it is older than the last 8K tokens;
    both None where there is no evidence. evidence_blocks: the 256-token blocks it lies in, and byte_tokens:
    how many tokens the prompt then has, if a token is a byte.
    """

    suite: str
    length_tokens: int
    document: str
    number: int
    turns: tuple[Turn, ...]
    question: Question
    max_tokens: int
    depth: float | None = None
    outside_tail: bool | None = None
    evidence_blocks: tuple[int, ...] = ()
    byte_tokens: int | None = None

    @property
    def key(self) -> str:
        """Names the item in the file of answers."""
        return f"{self.suite}/{self.length_tokens}/{self.document}/{self.number}"

    def score(self, reply: str) -> float:
        """How right a reply is, 0..1."""
        return grade(self.question, reply)


@dataclass(frozen=True)
class Document:
    """Items that share a prompt's beginning: the first is asked alone, the others find it in the cache."""

    items: tuple[Item, ...]


def generated(
    suite: str, length_tokens: int, *, num_questions: int, per_document: int, first_seed: int
) -> Iterator[Document]:
    """Test documents until there are so many questions, at most `per_document` on each."""
    left, seed = num_questions, first_seed
    while left > 0:
        task = generate(
            suite,
            length_tokens=length_tokens,
            split=Split.TEST,
            seed=seed,
            num_questions=min(per_document, left),
        )
        yield Document(
            tuple(
                _item(task, question, length_tokens, seed, at) for at, question in enumerate(task.questions)
            )
        )
        left -= len(task.questions)
        seed += 1


def _item(task: Task, question: Question, length_tokens: int, seed: int, number: int) -> Item:
    depth = evidence_depth(task, question)
    turns = messages(task, question)
    return Item(
        suite=task.suite,
        length_tokens=length_tokens,
        document=f"seed-{seed}",
        number=number,
        turns=tuple(turns),
        question=question,
        max_tokens=len(question.answer) + ANSWER_SLACK,
        depth=depth,
        outside_tail=None if depth is None else outside_last(task, question, TAIL_TOKENS),
        evidence_blocks=evidence_blocks(turns, question.evidence),
        byte_tokens=chat_tokens(turns, "") - 1,  # the answer's end is not in the prompt
    )


def evidence_blocks(turns: list[Turn], evidence: tuple[Evidence, ...]) -> tuple[int, ...]:
    """Blocks that spans of these turns lie in, where a token is a byte."""
    starts: list[int] = []
    at = 1  # BOS
    for turn in turns:
        before = {"system": 0, "user": USER_CONTROLS, "assistant": ASSISTANT_CONTROLS - 1}[turn.role]
        starts.append(at + before)
        at += before + len(turn.text) + (turn.role == "assistant")
    blocks: set[int] = set()
    for span in evidence:
        first = starts[span.turn] + span.start
        last = starts[span.turn] + span.end - 1
        blocks.update(range(first // BLOCK_TOKENS, last // BLOCK_TOKENS + 1))
    return tuple(sorted(blocks))
