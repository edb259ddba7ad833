"""A whole matrix of suites, lengths and arms over several endpoints, in as much time as there is.

Documents of all cells take turns, so that whenever it stops every cell has about the same share of its
questions. What the file of answers has is not asked twice: the next call goes on.
"""

import asyncio
import heapq
import itertools
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from forepage.suites.registry import SUITES
from loadtest.quality.answers import Answer, AnswerFile
from loadtest.quality.arms import Arm
from loadtest.quality.endpoint import Endpoint
from loadtest.quality.items import Document, generated
from loadtest.quality.runner import Runner, RunSettings

DOCUMENTS_AT_ONCE = 2
"""Of one endpoint: while one's last answers are written the next one's prompt is read."""


class PlanError(Exception):
    """A plan that can't be run: file, field and what is wrong."""


class CellPlan(BaseModel):
    """Some suites at some lengths, in some arms; `questions` of each suite and length."""

    model_config = ConfigDict(extra="forbid")

    suites: list[str] = Field(default_factory=lambda: list(SUITES))
    lengths: Annotated[list[int], Field(min_length=1)]
    arms: Annotated[list[Arm], Field(min_length=1)]
    questions: Annotated[int, Field(ge=1)]
    per_document: Annotated[int, Field(ge=1)] = 16
    budget_blocks: Annotated[int, Field(ge=1)] | None = None
    """None: what a server gives to prompts of this length."""
    threshold: Annotated[float, Field(ge=0.0, le=1.0)] | None = None


class MatrixPlan(BaseModel):
    """A file of cells."""

    model_config = ConfigDict(extra="forbid")

    cell: Annotated[list[CellPlan], Field(min_length=1)]

    @classmethod
    def read(cls, path: Path) -> "MatrixPlan":
        """Raises: PlanError."""
        try:
            plan = cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except (OSError, tomllib.TOMLDecodeError, ValidationError) as error:
            raise PlanError(f"{path}: {error}") from error
        unknown = sorted({suite for cell in plan.cell for suite in cell.suites} - set(SUITES))
        if unknown:
            raise PlanError(f"{path}: no such suite: {', '.join(unknown)}")
        return plan

    def cells(self) -> "list[Cell]":
        """One for each suite and length."""
        return [
            Cell(suite, length, part)
            for part in self.cell
            for length in part.lengths
            for suite in part.suites
        ]

    @property
    def num_answers(self) -> int:
        """Of all cells and arms."""
        return sum(cell.plan.questions * len(cell.plan.arms) for cell in self.cells())


@dataclass(frozen=True)
class Cell:
    """One suite at one length."""

    suite: str
    length_tokens: int
    plan: CellPlan

    def documents(self, first_seed: int) -> Iterator[Document]:
        """Its documents, one seed after the other."""
        yield from generated(
            self.suite,
            self.length_tokens,
            num_questions=self.plan.questions,
            per_document=self.plan.per_document,
            first_seed=first_seed,
        )


def taking_turns(cells: Sequence[Cell], first_seed: int) -> Iterator[tuple[Cell, Document]]:
    """All documents of all cells; next comes the cell that has had the smallest share of its questions."""
    order = itertools.count()
    heap = [(0.0, next(order), cell, cell.documents(first_seed)) for cell in cells]
    heapq.heapify(heap)
    given = [0] * len(cells)
    while heap:
        _, number, cell, documents = heap[0]
        document = next(documents, None)
        if document is None:
            heapq.heappop(heap)
            continue
        given[number] += len(document.items)
        heapq.heapreplace(heap, (given[number] / cell.plan.questions, number, cell, documents))
        yield cell, document


@dataclass
class Matrix:
    """Runs a plan; `until_s` (of time.monotonic) is when nothing more is asked."""

    endpoints: Sequence[Endpoint]
    answers: AnswerFile
    concurrency: int
    on_answer: Callable[[Answer], None]
    until_s: float | None = None
    _runners: dict[tuple[int, int], Runner] = field(default_factory=dict)

    async def run(self, documents: Iterator[tuple[Cell, Document]]) -> bool:
        """Whether all of them were asked in time. Endpoints take the next one as they come to it."""
        slots = [asyncio.Semaphore(self.concurrency) for _ in self.endpoints]
        source = _InTurn(documents)
        async with asyncio.TaskGroup() as tasks:
            for number, slot in enumerate(slots):
                for _ in range(DOCUMENTS_AT_ONCE):
                    tasks.create_task(self._serve(number, slot, source))
        return not self._is_over() and await source.next() is None

    async def _serve(self, number: int, slots: asyncio.Semaphore, documents: "_InTurn") -> None:
        while not self._is_over():
            given = await documents.next()
            if given is None:
                return
            cell, document = given
            await self._runner(number, cell, slots).document(document)
            await asyncio.sleep(0)  # documents that are all answered would keep the others waiting

    def _runner(self, number: int, cell: Cell, slots: asyncio.Semaphore) -> Runner:
        key = (number, id(cell.plan))
        if key not in self._runners:
            plan = cell.plan
            settings = RunSettings(plan.arms, self.concurrency, plan.budget_blocks, plan.threshold)
            self._runners[key] = Runner(
                self.endpoints[number],
                self.answers,
                settings,
                self.on_answer,
                slots=slots,
                is_over=self._is_over,
            )
        return self._runners[key]

    def _is_over(self) -> bool:
        return self.until_s is not None and time.monotonic() >= self.until_s


class _InTurn:
    """Makes one document at a time, on a thread: half a million tokens take .1 s, while answers come in."""

    def __init__(self, documents: Iterator[tuple[Cell, Document]]) -> None:
        self._documents = documents
        self._lock = asyncio.Lock()

    async def next(self) -> tuple[Cell, Document] | None:
        """None behind the last."""
        async with self._lock:
            return await asyncio.to_thread(next, self._documents, None)
