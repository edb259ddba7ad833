"""Spill tiers behind the arena: where evicted records go, and come back from on a lease.

A tier stores whole records (records.py) by key. It may lose any of them, and it never raises for its own
trouble: that is counted, and the record is missing. `RecordTiers` asks them in the order of the settings
and refuses damaged records.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from forepage.coldpool.counters import ColdPoolCounters
from forepage.coldpool.records import RecordInfo, decode_record
from forepage.errors import IntegrityError
from forepage.settings import Tier

_log = structlog.get_logger("forepage.coldpool")


class RecordTier(Protocol):
    """One store of records. Failures are counted by the tier and answered as "not there"."""

    @property
    def name(self) -> Tier:
        """Which tier this is, in the directory and in metrics."""

    async def open(self) -> None:
        """Take stock of what is stored already."""

    async def find(self, keys: Sequence[bytes]) -> set[bytes]:
        """Which of these keys are stored."""

    async def put(self, key: bytes, record: bytes) -> bool:
        """Store a record, dropping the least recently used ones to stay in bounds; False: not stored."""

    async def get(self, key: bytes) -> bytes | None:
        """The stored bytes, unverified."""

    async def drop(self, key: bytes) -> None:
        """Forget a record."""

    async def close(self) -> None:
        """Give connections back; what is stored stays."""


@dataclass(frozen=True)
class StoredRecord:
    """A verified record out of a tier; `payload` is [record.payload_bytes]."""

    record: RecordInfo
    payload: memoryview
    tier: Tier


class RecordTiers:
    """The tiers in order of preference; there may be none."""

    def __init__(self, tiers: Sequence[RecordTier], counters: ColdPoolCounters) -> None:
        self._tiers = tuple(tiers)
        self._counters = counters

    def __bool__(self) -> bool:
        return bool(self._tiers)

    async def open(self) -> None:
        """Open every tier."""
        for tier in self._tiers:
            await tier.open()

    async def find(self, keys: Sequence[bytes]) -> dict[bytes, Tier]:
        """Which keys some tier has, and the first that has it."""
        found: dict[bytes, Tier] = {}
        for tier in self._tiers:
            missing = [key for key in keys if key not in found]
            if missing:
                found.update(dict.fromkeys(await tier.find(missing), tier.name))
        return found

    async def put(self, key: bytes, record: bytes) -> Tier | None:
        """Store a record in the first tier that takes it; None: none did."""
        for tier in self._tiers:
            if await tier.put(key, record):
                return tier.name
        return None

    async def get(self, key: bytes) -> StoredRecord | None:
        """Load and verify a record; damaged ones are dropped, counted, and looked for further down."""
        for tier in self._tiers:
            data = await tier.get(key)
            if data is None:
                continue
            try:
                record, payload = await asyncio.to_thread(decode_record, data, key=key)
            except IntegrityError as error:
                self._counters.count_damaged(tier.name)
                _log.warning("damaged_record_refused", tier=tier.name, key=key.hex(), reason=str(error))
                await tier.drop(key)
                continue
            return StoredRecord(record, payload, tier.name)
        return None

    async def close(self) -> None:
        """Close every tier."""
        for tier in self._tiers:
            await tier.close()
