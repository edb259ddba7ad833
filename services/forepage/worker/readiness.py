"""What a worker does between its model and its first request, and how far it is with it."""

import asyncio
from collections.abc import Callable

from forepage.worker.arena_mapping import PinnedArena
from forepage.worker.warm_up import WarmUp


class Readiness:
    """A worker is ready when its arena is page-locked and what it compiles is compiled."""

    def __init__(self, arena: PinnedArena, warm_up: WarmUp | None) -> None:
        self._arena = arena
        self._warm_up = warm_up
        self.is_ready = False

    @property
    def progress(self) -> str:
        """How far it is, for people."""
        pinned, total = self._arena.pinned_bytes >> 20, self._arena.num_bytes >> 20
        said = f"{pinned} of {total} MiB of its arena are page-locked"
        if self._warm_up is not None:
            said += f", {self._warm_up.done} of {self._warm_up.total} steps of its warm-up are done"
        return said

    async def prepare(self, is_stopping: Callable[[], bool]) -> None:
        """Until it is ready, or the worker is told to stop.

        Raises: DependencyError when the driver refuses the arena, IntegrityError for a damaged model.
        """
        await asyncio.to_thread(self._prepare, is_stopping)

    def _prepare(self, is_stopping: Callable[[], bool]) -> None:
        if self._warm_up is not None:
            self._warm_up.begin(is_stopping)
        self._arena.wait(is_stopping)
        if is_stopping():
            return
        if self._warm_up is not None:
            self._warm_up.finish(is_stopping)
        self.is_ready = not is_stopping()
