"""Asks every item in every arm: a document's arms together, so that its prefix is computed once."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

from loadtest.quality.answers import Answer, AnswerFile
from loadtest.quality.arms import Arm, budget_of, residency_fields
from loadtest.quality.endpoint import Endpoint
from loadtest.quality.items import Document, Item


@dataclass(frozen=True)
class RunSettings:
    """What all requests of a run share. `plain`: the endpoint doesn't know the `forepage` field."""

    arms: Sequence[Arm]
    concurrency: int
    budget_blocks: int | None = None
    threshold: float | None = None
    plain: bool = False


class Runner:
    """Runs documents against an endpoint into a file of answers."""

    def __init__(
        self,
        endpoint: Endpoint,
        answers: AnswerFile,
        settings: RunSettings,
        on_answer: Callable[[Answer], None],
        *,
        slots: asyncio.Semaphore | None = None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        """`slots` are shared by runners of one endpoint; once `is_over` nothing more is asked."""
        self._is_over = is_over
        self._endpoint = endpoint
        self._answers = answers
        self._settings = settings
        self._on_answer = on_answer
        self._slots = slots or asyncio.Semaphore(settings.concurrency)

    async def run(self, documents: Iterable[Document]) -> None:
        """Everything that has no answer yet; two documents at a time, so that the server never idles."""
        pending = asyncio.Semaphore(2)
        async with asyncio.TaskGroup() as tasks:
            for document in documents:
                todo = self._todo(document)
                if not todo:
                    continue
                await pending.acquire()
                task = tasks.create_task(self._document(todo))
                task.add_done_callback(lambda _: pending.release())

    async def document(self, document: Document) -> None:
        """What of one document has no answer yet."""
        if todo := self._todo(document):
            await self._document(todo)

    def _todo(self, document: Document) -> list[tuple[Item, Arm]]:
        return [
            (item, arm)
            for arm in self._settings.arms
            for item in document.items
            if (item.key, arm.value) not in self._answers.done
        ]

    async def _document(self, todo: list[tuple[Item, Arm]]) -> None:
        """The first question computes the prefix, the others find it."""
        await self._ask(*todo[0])
        async with asyncio.TaskGroup() as tasks:
            for item, arm in todo[1:]:
                tasks.create_task(self._ask(item, arm))

    async def _ask(self, item: Item, arm: Arm) -> None:
        async with self._slots:
            if self._is_over():
                return
            started = monotonic()
            reply = await self._endpoint.ask(item, self._fields(item, arm))
            answer = Answer.of(
                item,
                arm,
                reply=reply.text,
                usage=reply.usage,
                seconds=monotonic() - started,
                error=reply.error,
            )
        self._answers.append(answer)
        self._on_answer(answer)

    def _fields(self, item: Item, arm: Arm) -> dict[str, Any] | None:
        if self._settings.plain:
            return None
        budget = self._settings.budget_blocks or budget_of(item.length_tokens)
        return residency_fields(arm, budget_blocks=budget, threshold=self._settings.threshold)
