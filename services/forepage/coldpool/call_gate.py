"""Many calls at once, or one re-attachment alone: so that an announcement never misses a lease in flight."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class CallGate:
    """For one event loop; leaving never waits, so a cancelled caller can't keep it shut."""

    def __init__(self) -> None:
        self._num_calls = 0
        self._is_alone = False
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def call(self) -> AsyncIterator[None]:
        """Among others; waits while somebody is alone."""
        while self._is_alone:
            await self._next_change()
        self._num_calls += 1
        try:
            yield
        finally:
            self._num_calls -= 1
            self._changed.set()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """With no call under way, and none beginning."""
        while self._is_alone:
            await self._next_change()
        self._is_alone = True
        try:
            while self._num_calls:
                await self._next_change()
            yield
        finally:
            self._is_alone = False
            self._changed.set()

    async def _next_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
