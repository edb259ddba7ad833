"""The file of raw answers: one JSON object a line, as they come; what is in it is not asked again."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from loadtest.quality.arms import Arm
from loadtest.quality.items import Item


@dataclass(frozen=True)
class Answer:
    """What one arm said to one item. `error`: why there is no reply; then the score is 0."""

    key: str
    arm: str
    suite: str
    length_tokens: int
    document: str
    kind: str
    score: float
    reply: str
    depth: float | None
    outside_tail: bool | None
    evidence_blocks: list[int]
    byte_tokens: int | None
    prompt_tokens: int | None
    completion_tokens: int | None
    seconds: float
    error: str | None = None
    residency: dict[str, Any] = field(default_factory=dict)
    """`usage.forepage`."""

    @classmethod
    def of(
        cls,
        item: Item,
        arm: Arm,
        *,
        reply: str,
        usage: dict[str, Any],
        seconds: float,
        error: str | None = None,
    ) -> "Answer":
        """Grade a reply."""
        return cls(
            key=item.key,
            arm=arm.value,
            suite=item.suite,
            length_tokens=item.length_tokens,
            document=item.document,
            kind=item.question.kind,
            score=item.score(reply) if error is None else 0.0,
            reply=reply,
            depth=item.depth,
            outside_tail=item.outside_tail,
            evidence_blocks=list(item.evidence_blocks),
            byte_tokens=item.byte_tokens,
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
            seconds=round(seconds, 3),
            error=error,
            residency=usage.get("forepage") or {},
        )


class AnswerFile:
    """Appends answers; each line is written whole before the next request's answer is."""

    def __init__(self, path: Path) -> None:
        """Cuts off a last line that an interruption left half written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            text = path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                path.write_text(whole, encoding="utf-8")
        before = read_answers(path) if path.exists() else ()
        self.done = {(one.key, one.arm) for one in before if one.error is None}
        self._file: TextIO = path.open("a", encoding="utf-8")

    def append(self, answer: Answer) -> None:
        """Write one; an error is written too, but asked again by the next run."""
        self._file.write(json.dumps(asdict(answer), separators=(",", ":")) + "\n")
        self._file.flush()
        if answer.error is None:
            self.done.add((answer.key, answer.arm))

    def close(self) -> None:
        """No more."""
        self._file.close()


def read_answers(path: Path) -> Iterator[Answer]:
    """Every answer once: the last one of a key and arm, without errors that a later run made good."""
    last: dict[tuple[str, str], Answer] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        answer = Answer(**json.loads(line))
        if answer.error is None or (answer.key, answer.arm) not in last:
            last[answer.key, answer.arm] = answer
    yield from last.values()
