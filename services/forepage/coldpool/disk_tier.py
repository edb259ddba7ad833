"""The disk tier: one file a record, named by the key in hex, in a folder of this instance alone.

Files appear whole (written beside, then renamed). They are not flushed to the device: after a power
failure a torn file fails its checksum and is a missing record.
"""

import asyncio
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import structlog

from forepage.coldpool.byte_lru import ByteLru
from forepage.coldpool.counters import ColdPoolCounters
from forepage.coldpool.records import key_from_hex
from forepage.settings import Tier

_UNFINISHED = ".new"
_log = structlog.get_logger("forepage.coldpool")


class DiskTier:
    """Owner of the folder's files; at most `max_bytes` of them, least recently used dropped first."""

    def __init__(self, folder: Path, *, max_bytes: int, counters: ColdPoolCounters) -> None:
        self._folder = folder
        self._counters = counters
        self._stored = ByteLru(max_bytes)

    @property
    def name(self) -> Tier:
        """Always the disk."""
        return Tier.DISK

    @property
    def stored_bytes(self) -> int:
        """Bytes of all files."""
        return self._stored.stored_bytes

    async def open(self) -> None:
        """List the folder (made with mode 0700 if need be), least recently used first."""
        try:
            listed = await asyncio.to_thread(_list_records, self._folder)
        except OSError as error:
            self._failed(error)
            return
        for key, size in listed:
            self._stored.add(key, size)
        await self._shrink()

    async def find(self, keys: Sequence[bytes]) -> set[bytes]:
        """From the list in memory; a file that is gone shows at `get`."""
        return {key for key in keys if key in self._stored}

    async def put(self, key: bytes, record: bytes) -> bool:
        """Write a file."""
        if len(record) > self._stored.max_bytes:
            return False
        try:
            await asyncio.to_thread(_write_file, self._path(key), record)
        except asyncio.CancelledError:
            self._stored.add(key, len(record))  # the thread goes on, so count what it writes
            raise
        except OSError as error:
            self._failed(error)
            return False
        self._stored.add(key, len(record))
        await self._shrink()
        return True

    async def get(self, key: bytes) -> bytes | None:
        """Read a file."""
        if key not in self._stored:
            return None
        try:
            data = await asyncio.to_thread(_read_file, self._path(key))
        except OSError as error:
            self._failed(error)
            await self.drop(key)  # a file that stays but is not counted would be over the bound
            return None
        self._stored.touch(key)
        return data

    async def drop(self, key: bytes) -> None:
        """Delete a file."""
        self._stored.remove(key)
        try:
            await asyncio.to_thread(self._path(key).unlink, missing_ok=True)
        except OSError as error:
            self._failed(error)

    async def close(self) -> None:
        """Nothing is open between calls."""

    async def _shrink(self) -> None:
        while (key := self._stored.overflow()) is not None:
            await self.drop(key)

    def _path(self, key: bytes) -> Path:
        return self._folder / key.hex()

    def _failed(self, error: OSError) -> None:
        self._counters.count_tier_error(self.name)
        _log.warning("tier_failed", tier=self.name, folder=str(self._folder), reason=str(error))


def _list_records(folder: Path) -> list[tuple[bytes, int]]:
    """Keys and sizes of the folder's records by time of last use; removes unfinished files."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found: list[tuple[int, bytes, int]] = []
    for path in folder.iterdir():
        if path.name.endswith(_UNFINISHED):
            path.unlink(missing_ok=True)
        elif (key := key_from_hex(path.name)) is not None:
            status = path.stat()
            found.append((status.st_mtime_ns, key, status.st_size))
    return [(key, size) for _, key, size in sorted(found)]


def _write_file(path: Path, data: bytes) -> None:
    # A name of its own: two writers of one key (a cancelled call's thread) must not share a file.
    descriptor, unfinished = tempfile.mkstemp(suffix=_UNFINISHED, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(unfinished).replace(path)
    except OSError:
        Path(unfinished).unlink(missing_ok=True)
        raise


def _read_file(path: Path) -> bytes:
    data = path.read_bytes()
    os.utime(path)  # so that the order of last use survives a restart
    return data
