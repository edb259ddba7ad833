"""What a task of any suite is: a conversation, questions on it, and where in it the answers lie.

Generators make these, training and the quality harness read them. All text is printable ASCII and newlines,
so with the byte tokenizer a character span is a token span.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Role = Literal["system", "user", "assistant"]


class Split(StrEnum):
    """Which words, names, templates and seeds a task draws from; the two never share a secret or a name."""

    TRAIN = "train"
    TEST = "test"


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: Role
    text: str


@dataclass(frozen=True)
class Evidence:
    """Characters [start, end) of `context[turn].text` that the answer needs."""

    turn: int
    start: int
    end: int


@dataclass(frozen=True)
class Question:
    """One question on a context, with what is right to answer.

    `answer` is a good reply in plain sentences, facts copied from the context; `expected` is what `grade`
    looks for; `kind` names the sub-type ("niah_single_1", "temporal", ...) and picks the rule of grading.
    """

    text: str
    answer: str
    expected: tuple[str, ...]
    evidence: tuple[Evidence, ...]
    kind: str


@dataclass(frozen=True)
class Task:
    """A context and the questions that share it.

    inline: the question follows the document in the same (only) user turn after a blank line; otherwise it is
    a user turn of its own after `context`.
    """

    suite: str
    context: tuple[Turn, ...]
    inline: bool
    questions: tuple[Question, ...]


def messages(task: Task, question: Question) -> list[Turn]:
    """The turns of one request: the context, then the question."""
    if not task.inline:
        return [*task.context, Turn("user", question.text)]
    *before, document = task.context
    return [*before, Turn(document.role, f"{document.text}\n\n{question.text}")]


def tokens_after(task: Task, span: Evidence) -> int:
    """How many characters of the context come after a span: its distance from the question."""
    later = sum(len(turn.text) for turn in task.context[span.turn + 1 :])
    return later + len(task.context[span.turn].text) - span.end


def evidence_depth(task: Task, question: Question) -> float | None:
    """Mean place of the evidence in the context, 0 = first character, 1 = last; None without evidence."""
    total = sum(len(turn.text) for turn in task.context)
    if not question.evidence or total == 0:
        return None
    distances = [tokens_after(task, span) for span in question.evidence]
    return 1.0 - sum(distances) / len(distances) / total


def outside_last(task: Task, question: Question, tokens: int = 8192) -> bool:
    """Whether there is evidence, and all of it lies more than `tokens` characters before the question."""
    return bool(question.evidence) and all(tokens_after(task, span) >= tokens for span in question.evidence)
