"""The Redis value tier: one value a record, without expiry, bounded by our own account of what is there.

Key names: `forepage:<instance>:record:<key hex>`. While Redis does not answer, the tier is skipped for a
moment after each failure, so that leases of what is in the arena don't wait for its timeouts.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar, cast

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from forepage.coldpool.byte_lru import ByteLru
from forepage.coldpool.counters import ColdPoolCounters
from forepage.coldpool.records import key_from_hex
from forepage.settings import Tier

PAUSE_S = 1.0
_BATCH = 512
_log = structlog.get_logger("forepage.coldpool")
_T = TypeVar("_T")


class RedisTier:
    """Owner of the instance's record values; the client's timeouts bound every call."""

    def __init__(
        self,
        client: Redis,
        *,
        instance: str,
        max_bytes: int,
        counters: ColdPoolCounters,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._prefix = f"forepage:{instance}:record:"
        self._counters = counters
        self._clock = clock
        self._stored = ByteLru(max_bytes)
        self._is_counted = False
        self._paused_until = 0.0

    @property
    def name(self) -> Tier:
        """Always Redis."""
        return Tier.REDIS

    @property
    def stored_bytes(self) -> int:
        """Bytes of all values, by our account."""
        return self._stored.stored_bytes

    async def open(self) -> None:
        """Count what is there already; done later if Redis does not answer now."""
        await self._try(self._count_stored)

    async def find(self, keys: Sequence[bytes]) -> set[bytes]:
        """Asks Redis, so that it also sees what other hosts of the instance stored."""

        async def ask() -> set[bytes]:
            found: set[bytes] = set()
            for start in range(0, len(keys), _BATCH):
                batch = keys[start : start + _BATCH]
                async with self._client.pipeline(transaction=False) as pipe:
                    for key in batch:
                        pipe.exists(self._name(key))
                    answers = await pipe.execute()
                found.update(key for key, answer in zip(batch, answers, strict=True) if answer)
            return found

        return await self._try(ask) or set()

    async def put(self, key: bytes, record: bytes) -> bool:
        """Set a value, deleting the least recently used ones above the bound."""
        if len(record) > self._stored.max_bytes:
            return False

        async def store() -> bool:
            await self._count_stored()
            try:
                await self._client.set(self._name(key), record)
            except asyncio.CancelledError:
                self._stored.add(key, len(record))  # Redis may have it, so count it
                raise
            self._stored.add(key, len(record))
            await self._shrink()
            return True

        return await self._try(store) or False

    async def get(self, key: bytes) -> bytes | None:
        """Read a value."""

        async def load() -> bytes | None:
            return cast("bytes | None", await self._client.get(self._name(key)))

        data = await self._try(load)
        if data is None:
            self._stored.remove(key)
        self._stored.touch(key)
        return data

    async def drop(self, key: bytes) -> None:
        """Delete a value."""
        self._stored.remove(key)

        async def delete() -> None:
            await self._client.delete(self._name(key))

        await self._try(delete)

    async def close(self) -> None:
        """The client belongs to who made it."""

    async def _count_stored(self) -> None:
        if self._is_counted:
            return
        self._stored.clear()  # not later: what other calls set meanwhile is counted by them
        names = [name async for name in self._client.scan_iter(match=f"{self._prefix}*", count=_BATCH)]
        async with self._client.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.strlen(name)
            sizes = await pipe.execute()
        for name, size in zip(names, sizes, strict=True):
            key = key_from_hex(name[len(self._prefix) :].decode(errors="replace"))
            if key is not None:
                self._stored.add(key, size)
        self._is_counted = True
        await self._shrink()

    async def _shrink(self) -> None:
        while (key := self._stored.overflow()) is not None:
            self._stored.remove(key)
            await self._client.delete(self._name(key))

    async def _try(self, call: Callable[[], Awaitable[_T]]) -> _T | None:
        """Run a call; None if Redis fails, or did a moment ago."""
        if self._clock() < self._paused_until:
            return None
        try:
            return await call()
        except (RedisError, OSError) as error:
            self._paused_until = self._clock() + PAUSE_S
            self._is_counted = False
            self._counters.count_tier_error(self.name)
            _log.warning("tier_failed", tier=self.name, reason=str(error))
            return None

    def _name(self, key: bytes) -> str:
        return self._prefix + key.hex()
