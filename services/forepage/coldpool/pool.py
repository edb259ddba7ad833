"""The cold pool: arena, lease table, tiers and directory of one host, kept in step.

Every verb changes the table first and mirrors it into the headers before anything can wait, so that
headers, which outlive this process, are never ahead of or behind a reply. Reading payloads (checksums,
spilling) happens in threads, always on slots pinned by a stage of the table or checked again
by generation afterwards; writing them (a load) does not, see `_load_one`.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import structlog

from forepage.coldpool.arena import Arena
from forepage.coldpool.counters import ARENA, ColdPoolCounters
from forepage.coldpool.directory import Directory
from forepage.coldpool.lease_table import LeaseTable
from forepage.coldpool.records import (
    LAYOUT_VERSION,
    PublishedRecord,
    RecordInfo,
    SlotRef,
    encode_record,
    payload_checksum,
)
from forepage.coldpool.shm_names import HolderId
from forepage.coldpool.slot_table import SlotCounts
from forepage.coldpool.tiers import RecordTiers
from forepage.errors import IntegrityError, RequestError
from forepage.frames import DirectoryFrame
from forepage.settings import Tier, Verify

_SPILL_ROUNDS = 4
"""Reserve spills, then evicts; somebody may lease a victim meanwhile, so it looks again this often."""
_PARALLEL_IO = 4
NOT_IN_ARENA = -1
"""`arena_id` of a directory entry for a record that only a tier has."""
_log = structlog.get_logger("forepage.coldpool")


@dataclass(frozen=True)
class Identity:
    """Whose records these are, in the directory."""

    host: str
    instance: str


class ColdPool:
    """Owner of the arena's headers and of all state behind the RPCs."""

    def __init__(
        self,
        arena: Arena,
        table: LeaseTable,
        *,
        tiers: RecordTiers,
        directory: Directory | None,
        counters: ColdPoolCounters,
        identity: Identity,
        verify: Verify,
    ) -> None:
        self.arena = arena
        self.table = table
        self.tiers = tiers
        self.counters = counters
        self.verify = verify
        self._directory = directory
        self._identity = identity
        self.num_changes = 0
        """Grows with every change; an idle pool's stays."""
        self._mirror()

    def add_holder(self, holder: HolderId) -> None:
        """Know a holder."""
        self.table.add_holder(holder)

    def drop_holder(self, holder: HolderId) -> int:
        """A holder is gone: release what it leased, free what it was writing; answers how many slots."""
        num_held = self.table.drop_holder(holder)
        self._mirror()
        return num_held

    def announce(self, holder: HolderId, refs: Sequence[SlotRef]) -> list[SlotRef]:
        """Set a holder's leases; answers those that don't hold."""
        void = self.table.announce(holder, refs)
        self._mirror()
        return void

    def release(self, holder: HolderId, refs: Sequence[SlotRef]) -> int:
        """Give leases back; answers how many were stale."""
        num_stale = self.table.release(holder, refs)
        self.counters.count_stale_refs(num_stale)
        self._mirror()
        return num_stale

    def counts(self) -> SlotCounts:
        """Where the slots are."""
        return self.table.counts()

    @contextmanager
    def stage(self) -> Iterator[HolderId]:
        """Leases of one operation; whatever was not transferred is released at the end."""
        try:
            with self.table.stage() as holder:
                yield holder
        finally:
            self._mirror()

    async def reserve(self, holder: HolderId, count: int) -> list[SlotRef]:
        """Free slots to write, evicting (and spilling) as needed. Raises: CapacityError."""
        self.table.check_holder(holder)
        for _ in range(_SPILL_ROUNDS):
            num_missing = count - self.table.num_free
            victims = self.table.victims(max(num_missing, 0))
            if num_missing <= 0 or len(victims) < num_missing:
                break
            await self._evict(victims)
        refs = self.table.reserve(holder, count)  # no await since the eviction, so nobody took the slots
        self._mirror()
        return refs

    async def publish(self, holder: HolderId, written: Sequence[PublishedRecord]) -> list[SlotRef]:
        """Make written slots findable, all or none; answers the slot that stands for each record.

        Raises: RequestError for a slot this holder is not writing, or a payload larger than a slot.
        """
        if len({item.slot.arena_id for item in written}) != len(written):
            raise RequestError("a slot is published twice in one request", "records")
        if any(item.payload_bytes > self.arena.slot_bytes for item in written):
            raise RequestError(f"a payload is larger than a slot of {self.arena.slot_bytes} B", "records")
        if self.verify is Verify.ALWAYS:
            await self._verify_present([item.key for item in written])
        for item in written:
            self.table.check_publishable(holder, item.slot, item.key)
        refs = [self.table.publish(holder, item.slot, item.info) for item in written]
        self._mirror()
        for item, ref in zip(written, refs, strict=True):
            if item.slot == ref:
                self._list_in_directory(item.info, ref, ARENA)
        self.counters.ages.take_use(ref.arena_id for ref in refs)
        return refs

    async def load(self, stage: HolderId, keys: Sequence[bytes]) -> set[bytes]:
        """Bring records from the tiers into slots leased to `stage`; answers the keys that were not there.

        Raises: CapacityError if the arena has no room for them.
        """
        refs = await self.reserve(stage, len(keys))
        gone: set[bytes] = set()
        async with asyncio.TaskGroup() as tasks:
            for key, ref in zip(keys, refs, strict=True):
                tasks.create_task(self._load_one(stage, key, ref, gone))
        return gone

    async def check_payload(self, ref: SlotRef) -> bool:
        """Whether a complete slot's payload matches its checksum; if not, it is found no more."""
        record = self.table.record_of(ref)
        if record is None:
            return False
        payload = self.arena.payload(ref.arena_id)[: record.payload_bytes]
        if await asyncio.to_thread(payload_checksum, payload) == record.checksum:
            return True
        self._refuse(ref, record)
        return False

    async def check_payloads(self, refs: Sequence[SlotRef]) -> list[bool]:
        """`check_payload` of many, a few at a time; the caller pins them."""
        results: list[bool] = []
        for start in range(0, len(refs), _PARALLEL_IO):
            batch = refs[start : start + _PARALLEL_IO]
            results.extend(await asyncio.gather(*(self.check_payload(ref) for ref in batch)))
        return results

    def leave_directory(self) -> None:
        """Take every record of this arena out of the directory (a clean shutdown)."""
        for ref in self.table.complete_refs():
            record = self.table.record_of(ref)
            if record is not None and self._directory is not None:
                self._directory.drop(record.key)

    def _mirror(self) -> None:
        self.num_changes += 1
        for arena_id, header in self.table.take_changed():
            self.arena.write_header(arena_id, header)
        self.counters.ages.take_moves(self.table.take_moves())
        self.counters.show_slots(self.table.counts())

    async def _verify_present(self, keys: Sequence[bytes]) -> None:
        """Check the records that are there under these keys, as a publish is about to lease them."""
        with self.stage() as stage:
            present = [ref for key in keys if (ref := self.table.lease(stage, key)) is not None]
            await self.check_payloads(present)

    async def _evict(self, victims: Sequence[SlotRef]) -> None:
        """Spill victims to the tiers, then free those that nobody leased meanwhile."""
        records = {ref: record for ref in victims if (record := self.table.record_of(ref)) is not None}
        tier_by_key: dict[bytes, Tier] = {}
        if self.tiers:
            with self.stage() as stage:
                for record in records.values():
                    self.table.lease(stage, record.key)
                tier_by_key = await self._spill(records)
        evicted = [ref for ref in victims if self.table.evict(ref)]
        self._mirror()
        self.counters.count_evictions(len(evicted))
        for ref in evicted:
            self._list_spilled(records[ref], tier_by_key.get(records[ref].key))

    async def _spill(self, records: dict[SlotRef, RecordInfo]) -> dict[bytes, Tier]:
        """Store records that no tier has yet; answers where each of them is."""
        tier_by_key = await self.tiers.find([record.key for record in records.values()])
        todo = [(ref, record) for ref, record in records.items() if record.key not in tier_by_key]
        for start in range(0, len(todo), _PARALLEL_IO):
            batch = todo[start : start + _PARALLEL_IO]
            stored = await asyncio.gather(*(self._spill_one(ref, record) for ref, record in batch))
            for (_, record), tier in zip(batch, stored, strict=True):
                if tier is not None:
                    tier_by_key[record.key] = tier
        return tier_by_key

    async def _spill_one(self, ref: SlotRef, record: RecordInfo) -> Tier | None:
        payload = self.arena.payload(ref.arena_id)[: record.payload_bytes]
        try:
            encoded = await asyncio.to_thread(encode_record, record, payload)
        except IntegrityError:
            self._refuse(ref, record)
            return None
        return await self.tiers.put(record.key, encoded)

    async def _load_one(self, stage: HolderId, key: bytes, ref: SlotRef, gone: set[bytes]) -> None:
        stored = await self.tiers.get(key)
        if stored is not None and stored.record.payload_bytes > self.arena.slot_bytes:
            self.counters.count_damaged(stored.tier)
            stored = None
        if stored is None:
            gone.add(key)
            self.table.release(stage, [ref])
            return
        # Not in a thread: one that outlived a cancelled call would write into a slot that others got since.
        self.arena.payload(ref.arena_id)[: len(stored.payload)] = stored.payload
        published = self.table.publish(stage, ref, stored.record)
        self._mirror()
        if published == ref:
            self._list_in_directory(stored.record, ref, ARENA)

    def _refuse(self, ref: SlotRef, record: RecordInfo) -> None:
        """A payload did not match: unless the slot was reused meanwhile, the record is damaged."""
        if not self.table.mark_damaged(ref):
            return
        self._mirror()
        self.counters.count_damaged(ARENA)
        _log.error("damaged_record", arena_id=ref.arena_id, key=record.key.hex())
        if self._directory is not None:
            self._directory.drop(record.key)

    def _list_spilled(self, record: RecordInfo, tier: Tier | None) -> None:
        if tier is not None:
            self._list_in_directory(record, None, tier)
        elif self._directory is not None:
            self._directory.drop(record.key)

    def _list_in_directory(self, record: RecordInfo, ref: SlotRef | None, tier: str) -> None:
        if self._directory is None:
            return
        frame = DirectoryFrame(
            host=self._identity.host,
            instance=self._identity.instance,
            tier=tier,
            arena_id=NOT_IN_ARENA if ref is None else ref.arena_id,
            generation=0 if ref is None else ref.generation,
            layout_version=LAYOUT_VERSION,
            kind=record.kind,
            part=record.part,
            num_parts=record.num_parts,
            payload_bytes=record.payload_bytes,
            checksum=record.checksum,
        )
        self._directory.put(record.key, frame)
