"""The directory: a Redis hash a record, one field a host, saying where that host has the record.

Name `forepage:<instance>:directory:<key hex>`, field the host's name, value a DirectoryFrame. Writes go
through a bounded queue that keeps only the newest write of a key, so that Redis being slow or gone never
holds up the pool; what the queue has no room for is counted and lost. Readers check generations anyway.
"""

import asyncio
from collections import OrderedDict
from typing import cast

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from forepage.coldpool.counters import ColdPoolCounters
from forepage.coldpool.records import LAYOUT_VERSION
from forepage.errors import DependencyError, IntegrityError
from forepage.frames import DirectoryFrame

_BATCH = 256
_PAUSE_S = 0.5
_log = structlog.get_logger("forepage.coldpool")


class Directory:
    """Owner of this host's fields. `put` and `drop` never wait; `run` does the writing."""

    def __init__(
        self, client: Redis, *, instance: str, host: str, max_queued: int, counters: ColdPoolCounters
    ) -> None:
        self._client = client
        self._prefix = f"forepage:{instance}:directory:"
        self._host = host
        self._max_queued = max_queued
        self._counters = counters
        self._queue: OrderedDict[bytes, DirectoryFrame | None] = OrderedDict()
        self._has_work = asyncio.Event()
        self._is_down = False

    @property
    def num_queued(self) -> int:
        """Writes that wait."""
        return len(self._queue)

    def put(self, key: bytes, frame: DirectoryFrame) -> None:
        """Say where this host has a record."""
        self._enqueue(key, frame)

    def drop(self, key: bytes) -> None:
        """Say that this host has it no more."""
        self._enqueue(key, None)

    async def find(self, key: bytes) -> dict[str, DirectoryFrame]:
        """Which hosts have a record; entries that can't be read are left out.

        Raises: DependencyError while Redis does not answer.
        """
        try:
            fields = await cast("asyncio.Future[dict[bytes, bytes]]", self._client.hgetall(self._name(key)))
        except (RedisError, OSError) as error:
            raise DependencyError(f"directory: Redis does not answer ({error})", retry_after_s=1.0) from error
        found: dict[str, DirectoryFrame] = {}
        for host, value in fields.items():
            try:
                found[host.decode()] = _read(value)
            except (IntegrityError, UnicodeDecodeError) as error:
                self._counters.count_damaged("directory")
                _log.warning("directory_entry_refused", key=key.hex(), reason=str(error))
        return found

    async def run(self) -> None:
        """Write for ever; while Redis does not answer, try again every half second."""
        while True:
            await self._has_work.wait()
            if not await self.write_batch():
                await asyncio.sleep(_PAUSE_S)

    async def write_batch(self) -> bool:
        """Write the oldest queued entries; False if Redis did not take them (they stay queued)."""
        batch = dict(list(self._queue.items())[:_BATCH])
        try:
            async with self._client.pipeline(transaction=False) as pipe:
                for key, frame in batch.items():
                    if frame is None:
                        pipe.hdel(self._name(key), self._host)
                    else:
                        pipe.hset(self._name(key), self._host, cast("str", frame.encode()))
                await pipe.execute()
        except (RedisError, OSError) as error:
            self._note_down(error)
            return False
        for key, frame in batch.items():
            if key in self._queue and self._queue[key] is frame:  # else it was written again meanwhile
                del self._queue[key]
        if not self._queue:
            self._has_work.clear()
        self._note_up()
        return True

    async def flush(self) -> None:
        """Write all that is queued, until done or Redis fails."""
        while self._queue and await self.write_batch():
            pass

    def _enqueue(self, key: bytes, frame: DirectoryFrame | None) -> None:
        if key not in self._queue and len(self._queue) >= self._max_queued:
            self._counters.count_directory_dropped(1)
            return
        self._queue[key] = frame
        self._has_work.set()

    def _note_down(self, error: Exception) -> None:
        if not self._is_down:
            _log.warning("directory_down", reason=str(error), queued=len(self._queue))
        self._is_down = True

    def _note_up(self) -> None:
        if self._is_down:
            _log.info("directory_up", queued=len(self._queue))
        self._is_down = False

    def _name(self, key: bytes) -> str:
        return self._prefix + key.hex()


def _read(value: bytes) -> DirectoryFrame:
    """Raises: IntegrityError for what is no entry, or one of a record that this program can't read."""
    frame = DirectoryFrame.decode(value)
    if frame.layout_version != LAYOUT_VERSION:
        raise IntegrityError(
            f"directory entry: layout version {frame.layout_version}, this program reads {LAYOUT_VERSION}"
        )
    return frame
