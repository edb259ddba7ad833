"""How many generations run at once, and that none start while the process drains.

Law: running == slots entered - slots left; `idle` is set exactly when nothing runs.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from forepage.errors import DependencyError, RateLimitError


class Admission:
    """Slots for generations; one request holds one until its answer is out."""

    def __init__(self, max_running: int) -> None:
        self.max_running = max_running
        self._idle = asyncio.Event()
        self._idle.set()
        self.running = 0
        self.draining = False

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold a slot. Raises: RateLimitError when all are taken, DependencyError while draining."""
        if self.draining:
            raise DependencyError("this gateway is shutting down; try again", retry_after_s=1.0)
        if self.running >= self.max_running:
            raise RateLimitError(
                f"{self.max_running} requests are running, the most this gateway takes; try again",
                retry_after_s=1.0,
            )
        self.running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.running -= 1
            if not self.running:
                self._idle.set()

    def close(self) -> None:
        """Admit nothing more."""
        self.draining = True

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing runs; False when something still does by then."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
