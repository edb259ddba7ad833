"""Who holds which arena slot: the state machine of the cold pool, in memory, without I/O or time.

    free --reserve--> writing --publish--> leased <--lease/release--> cached --evict--> free
                         |                    |
                         +--release--> free   +--mark_damaged--> leased, not found, freed at last release

Laws: conservation (slot_table.py); a slot leased by anyone is never handed out; a ref of another
generation is never accepted.

After a restart, while any process that was alive then has not announced its leases, every adopted slot
may be its: adopted records can be found and leased, but not evicted, and adopted slots being written stay
as they are. The last announcement (or the death of who owes it) ends the doubt. A process that was only
stopped therefore keeps its blocks through a restart of the manager, for as long as it stays stopped.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from forepage.coldpool.records import RecordInfo, SlotHeader, SlotRef, SlotState
from forepage.coldpool.shm_names import HolderId
from forepage.coldpool.slot_table import Place, SlotCounts, SlotMove, SlotTable
from forepage.errors import CapacityError, RequestError
from forepage.kv.ids import ArenaId

UNKNOWN_HOLDER = "holder_id"
"""`param` of the error that tells a client to attach again."""


@dataclass(frozen=True)
class PrefixLease:
    """What was leased: `blocks` in order, and the parts of the resume record after the last of them."""

    blocks: tuple[SlotRef, ...] = ()
    resume_parts: tuple[SlotRef, ...] = ()

    @property
    def num_blocks(self) -> int:
        """Blocks the caller need not prefill again."""
        return len(self.blocks)


class LeaseTable:
    """Owner of leases. Holders must be added before they hold; refs are checked at every verb."""

    def __init__(self, num_slots: int, *, first_generation: int) -> None:
        self._slots = SlotTable(num_slots, first_generation=first_generation)
        self._leases: dict[HolderId, Counter[ArenaId]] = {}
        self._unannounced: set[HolderId] = set()
        # What each published into a slot that was freed, its key being there: that answer may be lost.
        self._moved: dict[HolderId, dict[ArenaId, tuple[SlotRef, SlotRef]]] = {}
        self._stage_ids = itertools.count()

    def add_holder(self, holder: HolderId) -> None:
        """Know a holder; leases that it has already stay."""
        self._leases.setdefault(holder, Counter())

    def check_holder(self, holder: HolderId) -> None:
        """Raises: RequestError (param UNKNOWN_HOLDER) unless the holder was added."""
        self._leases_of(holder)

    def drop_holder(self, holder: HolderId) -> int:
        """A holder is gone: its leases end, what it was writing is freed; answers how many slots it held."""
        self._moved.pop(holder, None)
        held = self._leases.pop(holder, Counter())
        # Newest first, so that the LRU gives up the far end of a prefix before its beginning.
        for arena_id, count in reversed(list(held.items())):
            self._slots.add_leases(arena_id, -count)
        self._end_doubt_of(holder)
        return sum(count > 0 for count in held.values())

    @contextmanager
    def stage(self) -> Iterator[HolderId]:
        """A holder of the manager's own for one operation; what it still holds at the end is released."""
        holder = HolderId(f"\0stage-{next(self._stage_ids)}")  # no client can have this name
        self.add_holder(holder)
        try:
            yield holder
        finally:
            self.drop_holder(holder)

    def transfer(self, source: HolderId, target: HolderId) -> None:
        """Everything `source` holds becomes `target`'s. Raises: RequestError if `target` is unknown."""
        self._leases_of(target).update(self._leases_of(source))
        self._leases[source] = Counter()

    def reserve(self, holder: HolderId, count: int) -> list[SlotRef]:
        """Hand out free slots for writing, all or none.

        Raises: CapacityError without enough free slots, RequestError for an unknown holder.
        """
        held = self._leases_of(holder)
        if count > self._slots.num_free:
            raise CapacityError(
                f"cold pool: {count} slots wanted, {self._slots.num_free} free", retry_after_s=1.0
            )
        refs = [self._slots.open() for _ in range(count)]
        held.update(ref.arena_id for ref in refs)
        return refs

    def publish(self, holder: HolderId, ref: SlotRef, record: RecordInfo) -> SlotRef:
        """A written slot becomes complete and findable; the holder's lease stays on what is answered.

        If the key is there already, the written slot is freed and the lease moves to the one that stays.
        Publishing the same slot again is answered as before. Raises: RequestError for a slot not so held.
        """
        self.check_publishable(holder, ref, record.key)
        present = self._slots.find(record.key)
        if present is not None and self._was_moved(holder, ref, record.key):
            return present
        if present is None:
            self._slots.complete(ref.arena_id, record)
            return ref
        if present != ref:
            self._change(self._leases_of(holder), ref.arena_id, -1)
            self._change(self._leases_of(holder), present.arena_id, 1)
            self._moved.setdefault(holder, {})[ref.arena_id] = (ref, present)
        return present

    def check_publishable(self, holder: HolderId, ref: SlotRef, key: bytes) -> None:
        """Raises: RequestError unless the holder is writing this slot or published this key there."""
        self.check_holder(holder)
        if self._was_moved(holder, ref, key):
            return
        slot = self._slots.slot_of(ref)
        if slot is None or not self.is_leased_by(holder, ref):
            raise RequestError(f"slot {ref.arena_id} is not held by {holder!r} at that generation", "records")
        if slot.state is not SlotState.WRITING and self._slots.find(key) != ref:
            raise RequestError(f"slot {ref.arena_id} was published as another record", "records")

    def _was_moved(self, holder: HolderId, ref: SlotRef, key: bytes) -> bool:
        """Whether publishing this slot gave the holder the lease it still has on the key's record."""
        present = self._slots.find(key)
        moved = self._moved.get(holder, {}).get(ref.arena_id)
        return present is not None and moved == (ref, present) and self.is_leased_by(holder, present)

    def lease(self, holder: HolderId, key: bytes) -> SlotRef | None:
        """One more lease on the record of a key; None if there is no such record."""
        ref = self._slots.find(key)
        if ref is not None:
            self._change(self._leases_of(holder), ref.arena_id, 1)
        return ref

    def release(self, holder: HolderId, refs: Sequence[SlotRef]) -> int:
        """Give leases back, listed in prefix order; answers how many were not this holder's (any more)."""
        held = self._leases_of(holder)
        num_stale = 0
        for ref in reversed(refs):  # so that the beginning of a prefix is evicted last
            if self.is_leased_by(holder, ref):
                self._change(held, ref.arena_id, -1)
            else:
                num_stale += 1
        return num_stale

    def announce(self, holder: HolderId, refs: Iterable[SlotRef]) -> list[SlotRef]:
        """The holder's leases are exactly these (one entry a lease); answers those that can't be.

        What it held before and does not name is released: a lost reply leaves nothing behind.
        """
        held = self._leases_of(holder)
        void: list[SlotRef] = []
        kept: Counter[ArenaId] = Counter()
        for ref, count in Counter(refs).items():
            granted = self._grantable(held, ref, count)
            void.extend([ref] * (count - granted))
            kept[ref.arena_id] += granted
        for arena_id in {**held, **kept}:
            self._change(held, arena_id, kept[arena_id] - held[arena_id])
        self._moved.pop(holder, None)
        self._end_doubt_of(holder)
        return void

    def find(self, key: bytes) -> SlotRef | None:
        """The complete, undamaged record of a key."""
        return self._slots.find(key)

    def is_leased_by(self, holder: HolderId, ref: SlotRef) -> bool:
        """Whether this holder has a lease on (or is writing) the slot at that generation."""
        return self._slots.slot_of(ref) is not None and self._leases_of(holder)[ref.arena_id] > 0

    def record_of(self, ref: SlotRef) -> RecordInfo | None:
        """Description of a complete, undamaged record; None if the slot is not that any more."""
        slot = self._slots.slot_of(ref)
        return slot.record if slot is not None and slot.state is SlotState.COMPLETE else None

    def mark_damaged(self, ref: SlotRef) -> bool:
        """A complete record failed its checksum: it is found no more. False if the ref is stale."""
        if self.record_of(ref) is None:
            return False
        self._slots.mark_damaged(ref.arena_id)
        return True

    def victims(self, count: int) -> list[SlotRef]:
        """The least recently released records that may be evicted, at most `count`; decides only."""
        return self._slots.evictable(count)

    def evict(self, ref: SlotRef) -> bool:
        """Free a cached record's slot; False if it is leased, in doubt, or not there any more."""
        slot = self._slots.slot_of(ref)
        if slot is None or slot.place is not Place.CACHED or slot.is_doubtful:
            return False
        self._slots.free(ref.arena_id)
        return True

    def adopt(
        self, headers: Iterator[tuple[ArenaId, SlotHeader | None]], live_holders: Iterable[HolderId]
    ) -> None:
        """Take over an arena found at the start; doubt lasts until each live holder announced or is gone."""
        self._slots.adopt(headers)
        self._unannounced = set(live_holders)
        if not self._unannounced:
            self._slots.end_doubt()

    @property
    def unannounced(self) -> frozenset[HolderId]:
        """Holders alive at the restart that have not said what they hold."""
        return frozenset(self._unannounced)

    @property
    def num_free(self) -> int:
        """Slots that can be reserved without evicting."""
        return self._slots.num_free

    def counts(self) -> SlotCounts:
        """Where the slots are."""
        return self._slots.counts()

    def complete_refs(self) -> list[SlotRef]:
        """Every record that can be found."""
        return self._slots.complete_refs()

    def take_changed(self) -> list[tuple[ArenaId, SlotHeader]]:
        """Headers to write since the last call."""
        return self._slots.take_changed()

    def take_moves(self) -> list[SlotMove]:
        """Where slots went since the last call, in order."""
        return self._slots.take_moves()

    def check_integrity(self) -> None:
        """Raises: IntegrityError if a law of the module is broken."""
        num_leases: Counter[ArenaId] = Counter()
        for held in self._leases.values():
            num_leases.update(held)
        self._slots.check_integrity(num_leases)

    def _leases_of(self, holder: HolderId) -> Counter[ArenaId]:
        try:
            return self._leases[holder]
        except KeyError:
            raise RequestError(f"holder {holder!r} is not attached", UNKNOWN_HOLDER) from None

    def _change(self, held: Counter[ArenaId], arena_id: ArenaId, count: int) -> None:
        held[arena_id] += count
        if held[arena_id] == 0:
            del held[arena_id]
        if count:
            self._slots.add_leases(arena_id, count)

    def _grantable(self, held: Counter[ArenaId], ref: SlotRef, count: int) -> int:
        """How many of `count` announced leases on `ref` can stand."""
        slot = self._slots.slot_of(ref)
        if slot is None or slot.state is SlotState.DAMAGED:
            return 0
        if slot.state is SlotState.COMPLETE:
            return count
        return 1 if held[ref.arena_id] or slot.num_leases == 0 else 0

    def _end_doubt_of(self, holder: HolderId) -> None:
        if holder not in self._unannounced:
            return
        self._unannounced.discard(holder)
        if not self._unannounced:
            self._slots.end_doubt()


def longest_prefix(
    block_keys: Sequence[bytes], resume_keys: Sequence[Sequence[bytes]], has: Callable[[bytes], bool]
) -> int:
    """Blocks to resume after: the largest n with every block 0..n-1 and a whole resume record at n.

    `resume_keys[i]` are the part keys of the resume record after block i; empty: don't resume there.
    """
    best = 0
    for index, (key, parts) in enumerate(zip(block_keys, resume_keys, strict=True)):
        if not has(key):
            break
        if parts and all(has(part) for part in parts):
            best = index + 1
    return best
