"""Published data sets in their own formats, when the user has them: RULER, LongMemEval, LongBench-v2.

Prompts are the data sets' own (RULER: Apache-2.0; the others: MIT). Lengths are guessed from characters;
every question is a document of its own.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from forepage.suites.task import Question, Turn
from loadtest.quality.items import TAIL_TOKENS, Document, Item

T = TypeVar("T")
CHARS_PER_TOKEN = 4
"""Of English prose, for what can't be known without the server's tokenizer."""

MAX_ANSWER_TOKENS = 128
LONGBENCH_PROMPT = (
    "Please read the following text and answer the question below.\n\n<text>\n{context}\n</text>\n\n"
    "What is the correct answer to this question: {question}\nChoices:\n(A) {choice_A}\n(B) {choice_B}\n"
    "(C) {choice_C}\n(D) {choice_D}\n\n"
    'Format your response as follows: "The correct answer is (insert answer here)".'
)
LONGMEMEVAL_PROMPT = (
    "I will give you several history chats between you and a user. "
    "Please answer the question based on the relevant chat history.\n\n\nHistory Chats:\n\n{history}\n\n"
    "Current Date: {date}\nQuestion: {question}\nAnswer:"
)


class FormatError(Exception):
    """A file isn't what its name says; the text names the file, the record and the field."""


def read_ruler(path: Path, *, chars_per_token: int = CHARS_PER_TOKEN) -> Iterator[Document]:
    """A RULER task's jsonl (`input`, `outputs`); the task is the folder's name, or the file's.

    The evidence is the last occurrence of each answer; tasks that count over the whole text have none.
    """
    known = ("niah", "vt", "cwe", "fwe", "qa")
    task = next((name for name in (path.stem, path.parent.name) if name.startswith(known)), None)
    if task is None:
        raise FormatError(f"{path}: neither the file nor its folder is named after a RULER task")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        if not line.strip():
            continue
        record = _object(path, number, line)
        prompt = _field(path, number, record, "input", str)
        outputs = tuple(map(str, _field(path, number, record, "outputs", list)))
        places = [] if task in ("cwe", "fwe") else [at for one in outputs if (at := prompt.rfind(one)) >= 0]
        yield Document(
            (
                _item(
                    f"ruler_{task}",
                    str(record.get("index", number)),
                    prompt,
                    Question(prompt[-200:], "", outputs, (), task),
                    places,
                    chars_per_token,
                ),
            )
        )


def read_longmemeval(path: Path, *, chars_per_token: int = CHARS_PER_TOKEN) -> Iterator[Document]:
    """LongMemEval's JSON list; `has_answer` marks the evidence. A reply that has the answer is right.

    The published score asks a model to judge; without one, answers are compared as text, which is stricter.
    """
    for number, record in enumerate(_list(path)):
        history, places = _history(path, number, record)
        kind = _field(path, number, record, "question_type", str).replace("-", "_")
        name = _field(path, number, record, "question_id", str)
        if name.endswith("_abs"):
            kind = "abstention"
        prompt = LONGMEMEVAL_PROMPT.format(
            history=history, date=record.get("question_date", ""), question=record["question"]
        )
        offset = prompt.index(history)
        question = Question(str(record["question"]), "", (str(record["answer"]),), (), kind)
        item = _item(
            "longmemeval_published", name, prompt, question, [offset + at for at in places], chars_per_token
        )
        yield Document((item,))


def read_longbench(path: Path, *, chars_per_token: int = CHARS_PER_TOKEN) -> Iterator[Document]:
    """LongBench-v2's JSON list; where its evidence lies nobody has written down."""
    for number, record in enumerate(_list(path)):
        for name in ("question", "choice_A", "choice_B", "choice_C", "choice_D", "answer", "context"):
            _field(path, number, record, name, str)
        prompt = LONGBENCH_PROMPT.format(**record)
        question = Question(
            record["question"], "", (record["answer"],), (), f"choice_{record.get('length', 'any')}"
        )
        yield Document(
            (_item("longbench_published", str(record["_id"]), prompt, question, [], chars_per_token),)
        )


def _history(path: Path, number: int, record: dict[str, Any]) -> tuple[str, list[int]]:
    """All sessions as text, and where the turns that have the answer begin."""
    sessions = _field(path, number, record, "haystack_sessions", list)
    dates = _field(path, number, record, "haystack_dates", list)
    if len(sessions) != len(dates):
        raise FormatError(f"{path}: record {number}: {len(sessions)} sessions with {len(dates)} dates")
    parts: list[str] = []
    places: list[int] = []
    at = 0
    for count, (session, date) in enumerate(zip(sessions, dates, strict=True), 1):
        parts.append(f"### Session {count}:\nSession Date: {date}\nSession Content:\n\n")
        at += len(parts[-1])
        for turn in session:
            if turn.get("has_answer"):
                places.append(at)
            parts.append(f"{turn['role']}: {turn['content']}\n\n")
            at += len(parts[-1])
    return "".join(parts), places


def _item(
    suite: str, name: str, prompt: str, question: Question, places: list[int], chars_per_token: int
) -> Item:
    tail = TAIL_TOKENS * chars_per_token
    return Item(
        suite=suite,
        length_tokens=_rounded(len(prompt) // chars_per_token),
        document=name,
        number=0,
        turns=(Turn("user", prompt),),
        question=question,
        max_tokens=MAX_ANSWER_TOKENS,
        depth=sum(places) / len(places) / len(prompt) if places else None,
        outside_tail=all(len(prompt) - at > tail for at in places) if places else None,
    )


def _rounded(tokens: int) -> int:
    """The next power of two from 1024 on: the row of the table a document belongs to."""
    length = 1024
    while length < tokens:
        length *= 2
    return length


def _list(path: Path) -> list[dict[str, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise FormatError(f"{path}: not JSON: {error}") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise FormatError(f"{path}: not a list of objects")
    return records


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise FormatError(f"{path}: line {number + 1} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise FormatError(f"{path}: line {number + 1} is not an object")
    return record


def _field(path: Path, number: int, record: dict[str, Any], name: str, sort: type[T]) -> T:
    value = record.get(name)
    if not isinstance(value, sort):
        raise FormatError(
            f"{path}: record {number}: {name} must be a {sort.__name__}, is {type(value).__name__}"
        )
    return value
