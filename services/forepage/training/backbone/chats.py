"""Tasks of the suites as training texts: a chat with many questions on one context, laid out as served.

The layout is that of `text/chat.py`, turn after turn. What is left at the end is filled with quoting: what
follows some words of the context is asked for. That works with any text, whatever the suite.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from forepage.suites.layout import SEPARATOR
from forepage.suites.registry import MIN_TOKENS, generate
from forepage.suites.task import Question, Split, Task
from forepage.training.backbone.disguise import disguised
from forepage.training.backbone.documents import NO_QUESTION, REST, Document

LEAST_CONTEXT = 0.55
"""Of a text: the rest at most goes to questions after the first."""
QUESTION_TOKENS = 110
"""About what a question with its answer takes."""
MAX_QUESTIONS = 160
MIN_WORDS, MAX_WORDS = 14, 30
MIN_QUOTE, MAX_QUOTE = 16, 64
"""Characters that are given, and that are asked for."""
QUOTE_ROOM = 160
MAX_MISSES = 8
DISGUISED_SHARE = 0.65
"""Of training's tasks, in made-up words."""
DECISIVE = 3
"""Tokens of a fact until copying on is easy."""
QUOTE_TEMPLATES = (
    'What comes right after "{given}"?',
    'Continue the text from "{given}".',
    'Which words follow "{given}" above?',
    "Go on from: {given}",
    'Somewhere above it says "{given}". How does it go on?',
)


@dataclass(frozen=True)
class ControlIds:
    """Control tokens of a chat."""

    bos: int = 256
    eos: int = 257
    user: int = 259
    assistant: int = 260
    end_think: int = 262


@dataclass
class ChatText:
    """A chat as it grows."""

    ids: ControlIds
    parts: list[np.ndarray] = field(default_factory=list)
    kinds: list[tuple[int, int]] = field(default_factory=list)
    length: int = 0
    num_questions: int = 0
    _questions: list[int] = field(default_factory=list)
    _decisive: list[int] = field(default_factory=list)

    def add(self, tokens: np.ndarray, kind: int = REST, decisive: Iterable[int] = ()) -> None:
        """Append tokens of one kind, some of them decisive; an answer is a question of its own."""
        self._decisive.extend(self.length + place for place in decisive)
        self.parts.append(tokens)
        self.kinds.append((len(tokens), kind))
        self._questions.append(NO_QUESTION if kind == REST else self.num_questions)
        self.num_questions += kind != REST
        self.length += len(tokens)

    def turn(self, role: str, text: str) -> None:
        """A turn of the context."""
        ids = self.ids
        if role == "assistant":
            self.add(np.array((ids.assistant, ids.end_think), np.uint16))
        elif role == "user":
            self.add(np.array((ids.user,), np.uint16))
        self.add(text_tokens(text))
        if role == "assistant":
            self.add(np.array((ids.eos,), np.uint16))

    def answer(self, text: str, kind: int, decisive: Iterable[int]) -> None:
        """The assistant's answer to what was asked last; its end is part of it."""
        ids = self.ids
        self.add(np.array((ids.assistant, ids.end_think), np.uint16))
        self.add(np.append(text_tokens(text), np.uint16(ids.eos)), kind, decisive)

    def document(self) -> Document:
        """All of it."""
        lengths = [length for length, _ in self.kinds]
        decisive = np.zeros(self.length, np.bool_)
        decisive[self._decisive] = True
        return Document(
            tokens=np.concatenate(self.parts),
            kinds=np.repeat(np.array([kind for _, kind in self.kinds], np.uint8), lengths),
            questions=np.repeat(np.array(self._questions, np.int32), lengths),
            decisive=decisive,
        )


def decisive_places(question: Question) -> Iterator[int]:
    """Characters of the answer that begin an expected fact; the first ones, where it is no copy of any."""
    begins = []
    for fact in question.expected:
        found = _first_copy(question, fact)
        if found is not None:
            begins.append((found, len(fact)))
    for begin, length in begins or [(0, len(question.answer))]:
        yield from range(begin, begin + min(length, DECISIVE))


def _first_copy(question: Question, fact: str) -> int | None:
    """Where the answer first says a fact; a number it ends up with may stand in other facts before."""
    if question.kind.startswith("choice_"):
        found = question.answer.rfind(f"({fact})") + 1
        return found or None
    found = (
        question.answer.rfind(fact) if fact.isdigit() and len(fact) < DECISIVE else question.answer.find(fact)
    )
    return found if found >= 0 else None


def text_tokens(text: str) -> np.ndarray:
    """One token a byte."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)


def chat_document(
    draw: np.random.Generator, suite: str, length: int, kinds: Mapping[str, int], split: Split
) -> Document:
    """A text of at most `length` tokens about one task of the suite; kinds has the suite's and "quotes"."""
    share = float(draw.uniform(LEAST_CONTEXT, 1.0))
    room = max(int(length * share), MIN_TOKENS)
    questions = min(MAX_QUESTIONS, 1 + (length - room) // QUESTION_TOKENS)
    seed = int(draw.integers(1 << 40))
    task = generate(suite, length_tokens=room, split=split, seed=seed, num_questions=questions)
    if split is Split.TRAIN and draw.random() < DISGUISED_SHARE:
        task = disguised(task, draw)
    chat = asked(task, length, kinds[suite])
    if split is Split.TRAIN:
        quote(chat, "\n".join(turn.text for turn in task.context), draw, length, kinds["quotes"])
    return chat.document()


def asked(task: Task, length: int, kind: int, ids: ControlIds | None = None) -> ChatText:
    """The context and as many of its questions as fit."""
    chat = ChatText(ids or ControlIds())
    chat.add(np.array((chat.ids.bos,), np.uint16))
    last = len(task.context) - 1
    for idx, turn in enumerate(task.context):
        if not (task.inline and idx == last):
            chat.turn(turn.role, turn.text)
    for idx, question in enumerate(task.questions):
        text = question.text
        if task.inline and idx == 0:
            text = f"{task.context[last].text}{SEPARATOR}{text}"
        if chat.length + len(text) + len(question.answer) + 4 > length:
            continue
        chat.turn("user", text)
        chat.answer(question.answer, kind, decisive_places(question))
    return chat


def quote(chat: ChatText, text: str, draw: np.random.Generator, length: int, kind: int) -> None:
    """Ask what follows some words that stand in the text once, until too little room is left."""
    misses = 0
    while length - chat.length > QUOTE_ROOM and misses < MAX_MISSES and len(text) > QUOTE_ROOM:
        given, asked_for = int(draw.integers(MIN_WORDS, MAX_WORDS)), int(draw.integers(MIN_QUOTE, MAX_QUOTE))
        start = int(draw.integers(len(text) - given - asked_for))
        words = text[start : start + given]
        if text.count(words) > 1:
            misses += 1
            continue
        template = QUOTE_TEMPLATES[int(draw.integers(len(QUOTE_TEMPLATES)))]
        chat.turn("user", template.format(given=words))
        chat.answer(text[start + given : start + given + asked_for], kind, range(DECISIVE))
