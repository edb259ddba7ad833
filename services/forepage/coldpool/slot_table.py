"""What each arena slot is: its state, generation, record and number of leases. In memory, no I/O.

Law: every slot is in exactly one place, so free + writing + leased + cached = all slots. Only
LeaseTable calls it; every change of a state is remembered for the pool, which mirrors it into the headers.
"""

import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from forepage.coldpool.records import MAX_GENERATION, RecordInfo, SlotHeader, SlotRef, SlotState
from forepage.errors import IntegrityError
from forepage.kv.ids import ArenaId


class Place(IntEnum):
    """The four terms of the conservation law."""

    FREE = 0
    WRITING = 1
    LEASED = 2
    CACHED = 3


@dataclass(frozen=True)
class SlotCounts:
    """How many slots are where; `leased` and `cached` ones are complete, `cached` has no lease."""

    total: int
    free: int
    writing: int
    leased: int
    cached: int


@dataclass(frozen=True)
class SlotMove:
    """A slot went from one term of the law to another."""

    arena_id: ArenaId
    before: Place
    after: Place


@dataclass(slots=True)
class Slot:
    """One slot; only SlotTable writes it."""

    state: SlotState = SlotState.FREE
    generation: int = 0
    record: RecordInfo | None = None
    num_leases: int = 0
    place: Place = Place.FREE
    is_doubtful: bool = False
    """Adopted, and perhaps held by a process that has not said so yet: neither freed nor evicted."""


class SlotTable:
    """Owner of the slots. Generations are handed out once in an arena's life, whatever the slot."""

    def __init__(self, num_slots: int, *, first_generation: int) -> None:
        self._slots = [Slot() for _ in range(num_slots)]
        self._places: dict[Place, OrderedDict[ArenaId, None]] = {place: OrderedDict() for place in Place}
        self._places[Place.FREE] = OrderedDict.fromkeys(ArenaId(index) for index in range(num_slots))
        self._id_by_key: dict[bytes, ArenaId] = {}
        self._next_generation = first_generation
        self._doubtful: set[ArenaId] = set()
        self._changed: set[ArenaId] = set()
        self._moves: list[SlotMove] = []

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def num_free(self) -> int:
        """Slots that can be opened now."""
        return len(self._places[Place.FREE])

    def slot_of(self, ref: SlotRef) -> Slot | None:
        """The slot, if it is in use at that generation."""
        if not 0 <= ref.arena_id < len(self._slots):
            return None
        slot = self._slots[ref.arena_id]
        return slot if slot.generation == ref.generation and slot.state is not SlotState.FREE else None

    def ref_of(self, arena_id: ArenaId) -> SlotRef:
        """The slot at its present generation."""
        return SlotRef(arena_id, self._slots[arena_id].generation)

    def find(self, key: bytes) -> SlotRef | None:
        """The complete, undamaged record of a key."""
        arena_id = self._id_by_key.get(key)
        return None if arena_id is None else self.ref_of(arena_id)

    def complete_refs(self) -> list[SlotRef]:
        """Every record that can be found."""
        return [self.ref_of(arena_id) for arena_id in self._id_by_key.values()]

    def open(self) -> SlotRef:
        """Take a free slot for writing, with one lease."""
        arena_id = next(iter(self._places[Place.FREE]))
        if self._next_generation > MAX_GENERATION:
            raise IntegrityError("cold pool: generations are used up")
        slot = self._slots[arena_id]
        slot.generation, slot.num_leases = self._next_generation, 1
        self._next_generation += 1
        self._set_state(arena_id, SlotState.WRITING)
        return SlotRef(arena_id, slot.generation)

    def complete(self, arena_id: ArenaId, record: RecordInfo) -> None:
        """A written slot becomes the record of its key."""
        self._slots[arena_id].record = record
        self._id_by_key[record.key] = arena_id
        self._set_state(arena_id, SlotState.COMPLETE)

    def mark_damaged(self, arena_id: ArenaId) -> None:
        """A complete record is found no more; freed now, or with its last lease."""
        self._forget_key(arena_id)
        self._set_state(arena_id, SlotState.DAMAGED)

    def add_leases(self, arena_id: ArenaId, count: int) -> None:
        """Change the number of leases (`count` may be negative)."""
        self._slots[arena_id].num_leases += count
        self._settle(arena_id)

    def free(self, arena_id: ArenaId) -> None:
        """Whatever was in the slot is gone."""
        self._forget_key(arena_id)
        slot = self._slots[arena_id]
        slot.record, slot.num_leases = None, 0
        self._set_state(arena_id, SlotState.FREE)

    def evictable(self, count: int) -> list[SlotRef]:
        """The least recently released cached records that no doubt protects, at most `count`."""
        cached = (a for a in self._places[Place.CACHED] if not self._slots[a].is_doubtful)
        return [self.ref_of(arena_id) for arena_id in itertools.islice(cached, count)]

    def adopt(self, headers: Iterator[tuple[ArenaId, SlotHeader | None]]) -> None:
        """Take over what an earlier manager left, every slot in doubt; None: a damaged header, freed.

        The oldest generation is the first to be evicted later.
        """
        newest = self._next_generation
        for arena_id, header in sorted(headers, key=lambda item: item[1].generation if item[1] else 0):
            if header is not None:
                newest = max(newest, header.generation)
                self._slots[arena_id].generation = header.generation
            if header is None or not self._adopt_slot(arena_id, header):
                self._changed.add(arena_id)
        # The gap is for generations that stood in damaged headers.
        self._next_generation = newest + len(self._slots) + 1

    def end_doubt(self) -> None:
        """Adopted slots are as all others: those that nobody claimed and hold no record are freed."""
        doubtful, self._doubtful = self._doubtful, set()
        for arena_id in sorted(doubtful):
            self._slots[arena_id].is_doubtful = False
            self._settle(arena_id)

    def counts(self) -> SlotCounts:
        """Where the slots are."""
        return SlotCounts(len(self._slots), *(len(self._places[place]) for place in Place))

    def take_changed(self) -> list[tuple[ArenaId, SlotHeader]]:
        """Headers to write since the last call."""
        changed, self._changed = self._changed, set()
        slots = ((arena_id, self._slots[arena_id]) for arena_id in sorted(changed))
        return [(arena_id, SlotHeader(slot.state, slot.generation, slot.record)) for arena_id, slot in slots]

    def take_moves(self) -> list[SlotMove]:
        """Where slots went since the last call, in order."""
        moves, self._moves = self._moves, []
        return moves

    def check_integrity(self, num_leases: Counter[ArenaId]) -> None:
        """Compare every slot with where it stands and with the leases that holders have.

        Raises: IntegrityError if the law of the module is broken.
        """
        if sum(len(ids) for ids in self._places.values()) != len(self._slots):
            raise IntegrityError(f"cold pool: slots are lost or counted twice: {self.counts()}")
        for index, slot in enumerate(self._slots):
            arena_id = ArenaId(index)
            found = slot.record is not None and self._id_by_key.get(slot.record.key) == arena_id
            if arena_id not in self._places[slot.place] or slot.place is not _place_of(slot):
                raise IntegrityError(f"cold pool: slot {arena_id} is counted as {slot.place.name}: {slot}")
            if slot.num_leases != num_leases[arena_id] or found is not (slot.state is SlotState.COMPLETE):
                raise IntegrityError(f"cold pool: leases or key of slot {arena_id} disagree: {slot}")
            num_writers_ok = slot.num_leases == 1 or (slot.num_leases == 0 and slot.is_doubtful)
            if slot.state is SlotState.WRITING and not num_writers_ok:
                raise IntegrityError(f"cold pool: slot {arena_id} has {slot.num_leases} writers")
            if slot.generation >= self._next_generation:
                raise IntegrityError(f"cold pool: generation of slot {arena_id} was not handed out yet")

    def _adopt_slot(self, arena_id: ArenaId, header: SlotHeader) -> bool:
        """Whether the slot stays in use; its header is then right already."""
        slot = self._slots[arena_id]
        if header.state is SlotState.FREE:
            return True
        if header.state is SlotState.COMPLETE:
            if header.record is None or header.record.key in self._id_by_key:
                return False
            self._id_by_key[header.record.key] = arena_id
        slot.state, slot.record, slot.is_doubtful = header.state, header.record, True
        self._doubtful.add(arena_id)
        self._settle(arena_id)
        return True

    def _set_state(self, arena_id: ArenaId, state: SlotState) -> None:
        self._slots[arena_id].state = state
        self._changed.add(arena_id)
        self._settle(arena_id)

    def _settle(self, arena_id: ArenaId) -> None:
        """Move a slot to where its state and leases say; what nobody holds and is no record is freed."""
        slot = self._slots[arena_id]
        is_unheld = slot.num_leases == 0 and not slot.is_doubtful
        if is_unheld and slot.state in (SlotState.WRITING, SlotState.DAMAGED):
            self.free(arena_id)
            return
        place = _place_of(slot)
        if place is not slot.place:
            del self._places[slot.place][arena_id]
            self._places[place][arena_id] = None
            self._moves.append(SlotMove(arena_id, slot.place, place))
            slot.place = place

    def _forget_key(self, arena_id: ArenaId) -> None:
        record = self._slots[arena_id].record
        if record is not None and self._id_by_key.get(record.key) == arena_id:
            del self._id_by_key[record.key]


def _place_of(slot: Slot) -> Place:
    if slot.state is SlotState.FREE:
        return Place.FREE
    if slot.state is SlotState.WRITING:
        return Place.WRITING
    return Place.LEASED if slot.num_leases or slot.state is SlotState.DAMAGED else Place.CACHED
