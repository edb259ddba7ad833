"""The lease table against a plain model: whatever happens in whatever order, its laws hold at every step.

The model knows the truth: what each live holder believes it holds. The headers are what the pool would
have written, so a restart is a new table that adopts them.
"""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from forepage.coldpool.lease_table import LeaseTable
from forepage.coldpool.records import RecordInfo, RecordKind, SlotHeader, SlotRef, SlotState
from forepage.coldpool.shm_names import HolderId
from forepage.errors import CapacityError, RequestError
from forepage.kv.ids import ArenaId

NUM_SLOTS = 6
KEYS = [bytes([number]) * 32 for number in range(3)]
HOLDERS = [HolderId(name) for name in ("ann", "bob", "cid")]
holders = st.sampled_from(HOLDERS)
keys = st.sampled_from(KEYS)


def record_of(key: bytes) -> RecordInfo:
    return RecordInfo(key, RecordKind.BLOCK, 0, 1, payload_bytes=8, checksum=1)


class LeaseMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable(NUM_SLOTS, first_generation=1)
        self.headers = {ArenaId(i): SlotHeader(SlotState.FREE, 0) for i in range(NUM_SLOTS)}
        self.held: dict[HolderId, Counter[SlotRef]] = {}
        self.complete: dict[bytes, SlotRef] = {}
        self.damaged: set[SlotRef] = set()
        self.dead: list[SlotRef] = []
        self.adopted: set[SlotRef] = set()
        self.must_announce: set[HolderId] = set()
        self.moved: dict[HolderId, dict[ArenaId, tuple[SlotRef, bytes, SlotRef]]] = {}
        """By who published into it: a slot freed because its key was there, whose answer may be lost."""

        for holder in HOLDERS[:2]:
            self.attach(holder)

    def mirror(self) -> None:
        self.headers.update(self.table.take_changed())

    @property
    def callers(self) -> list[HolderId]:
        return [holder for holder in HOLDERS if holder in self.held and holder not in self.must_announce]

    def writing(self, holder: HolderId) -> list[SlotRef]:
        done = {*self.complete.values(), *self.damaged}
        return [ref for ref, count in self.held[holder].items() if count and ref not in done]

    def is_held(self, ref: SlotRef) -> bool:
        return any(held[ref] for held in self.held.values())

    def lose(self, holder: HolderId, ref: SlotRef) -> None:
        """One lease less; what nobody holds and is no record is dead."""
        self.held[holder][ref] -= 1
        if not self.is_held(ref) and ref not in self.complete.values():
            self.damaged.discard(ref)
            self.dead.append(ref)

    @precondition(lambda self: len(self.held) < len(HOLDERS))
    @rule(holder=holders)
    def attach(self, holder: HolderId) -> None:
        if holder not in self.must_announce:
            self.table.add_holder(holder)
            self.held.setdefault(holder, Counter())

    @precondition(lambda self: self.callers)
    @rule(data=st.data(), count=st.integers(1, 3))
    def reserve(self, data: st.DataObject, count: int) -> None:
        self.do_reserve(data.draw(st.sampled_from(self.callers)), count)

    @precondition(lambda self: self.callers and self.table.num_free)
    @rule(data=st.data(), key=keys)
    def write_a_record(self, data: st.DataObject, key: bytes) -> None:
        holder = data.draw(st.sampled_from(self.callers))
        before = set(self.writing(holder))
        self.do_reserve(holder, 1)
        (ref,) = set(self.writing(holder)) - before
        self.do_publish(holder, ref, key)

    def do_reserve(self, holder: HolderId, count: int) -> None:
        try:
            refs = self.table.reserve(holder, count)
        except CapacityError:
            assert self.table.num_free < count
            return
        assert len(set(refs)) == count
        for ref in refs:
            assert not any(
                ref.arena_id == other.arena_id for held in self.held.values() for other in held if held[other]
            ), "a held slot was handed out"
            assert ref not in self.dead
            self.held[holder][ref] += 1
        self.mirror()

    @precondition(lambda self: any(self.writing(holder) for holder in self.callers))
    @rule(key=keys, data=st.data())
    def publish(self, key: bytes, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from([holder for holder in self.callers if self.writing(holder)]))
        self.do_publish(holder, data.draw(st.sampled_from(self.writing(holder))), key)

    def do_publish(self, holder: HolderId, ref: SlotRef, key: bytes) -> None:
        answer = self.table.publish(holder, ref, record_of(key))
        assert answer == self.complete.setdefault(key, ref)
        self.held[holder][answer] += 1
        self.lose(holder, ref)
        if answer == ref:
            assert self.table.publish(holder, ref, record_of(key)) == ref, "publishing again changes nothing"
        else:
            self.moved.setdefault(holder, {})[ref.arena_id] = (ref, key, answer)
        self.mirror()

    def answer_again(self, holder: HolderId, ref: SlotRef, key: bytes) -> SlotRef | None:
        """What publishing a dead slot again answers: the record its lease moved to, while that is held."""
        of, published, answer = self.moved.get(holder, {}).get(ref.arena_id, (None, None, ref))
        is_there = self.complete.get(key) == answer and self.held[holder][answer] > 0
        return answer if (of, published) == (ref, key) and is_there else None

    @precondition(lambda self: self.dead and self.callers)
    @rule(key=keys, data=st.data())
    def use_dead_ref(self, key: bytes, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.callers))
        ref = data.draw(st.sampled_from(self.dead))
        if (answer := self.answer_again(holder, ref, key)) is None:
            with pytest.raises(RequestError):
                self.table.publish(holder, ref, record_of(key))
        else:
            assert self.table.publish(holder, ref, record_of(key)) == answer, "a lost reply is given again"
            assert self.table.take_changed() == [], "and changes nothing"
        assert self.table.release(holder, [ref]) == 1
        assert self.table.record_of(ref) is None
        assert not self.table.evict(ref)
        assert not self.table.mark_damaged(ref)

    @precondition(lambda self: self.callers and self.complete)
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.callers))
        key = data.draw(st.sampled_from(sorted(self.complete)))
        ref = self.table.lease(holder, key)
        assert ref == self.complete[key]
        self.held[holder][ref] += 1

    @precondition(lambda self: any(self.held[holder].total() for holder in self.callers))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from([name for name in self.callers if self.held[name].total()]))
        mine = list(self.held[holder].elements())
        some = data.draw(st.lists(st.sampled_from(range(len(mine))), unique=True, min_size=1))
        refs = [mine[index] for index in some]
        assert self.table.release(holder, refs) == 0
        for ref in refs:
            self.lose(holder, ref)
        self.mirror()

    @precondition(lambda self: self.complete)
    @rule(count=st.integers(1, 3))
    def evict(self, count: int) -> None:
        for ref in self.table.victims(count):
            assert not self.is_held(ref), "a leased slot was chosen"
            assert not (self.must_announce and ref in self.adopted), "a slot in doubt was chosen"
            assert self.table.evict(ref)
            self.complete = {key: its for key, its in self.complete.items() if its != ref}
            self.dead.append(ref)
        self.mirror()

    @precondition(lambda self: self.complete)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        ref = self.complete.pop(data.draw(st.sampled_from(sorted(self.complete))))
        assert self.table.mark_damaged(ref)
        (self.damaged.add if self.is_held(ref) else self.dead.append)(ref)
        self.mirror()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(sorted(self.held)))
        for ref in list(self.held[holder].elements()):
            self.lose(holder, ref)
        del self.held[holder]
        self.must_announce.discard(holder)
        self.moved.pop(holder, None)
        self.table.drop_holder(holder)
        self.mirror()

    @rule()
    def restart_the_manager(self) -> None:
        self.table = LeaseTable(NUM_SLOTS, first_generation=1)
        self.must_announce = set(self.held)
        self.moved = {}
        self.adopted = set(self.complete.values())
        self.table.adopt(iter(self.headers.items()), self.must_announce)
        self.mirror()

    @precondition(lambda self: self.must_announce)
    @rule(data=st.data())
    def announce(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(sorted(self.must_announce)))
        self.must_announce.discard(holder)
        self.table.add_holder(holder)
        self.moved.pop(holder, None)
        void = self.table.announce(holder, list(self.held[holder].elements()))
        expected = [ref for ref in self.held[holder].elements() if ref in self.damaged]
        assert Counter(void) == Counter(expected), "only damaged records may be lost"
        for ref in expected:
            self.lose(holder, ref)
        self.mirror()

    @precondition(lambda self: self.callers)
    @rule(data=st.data())
    def announce_less_after_a_lost_reply(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.callers))
        mine = list(self.held[holder].elements())
        self.moved.pop(holder, None)
        num_lost = data.draw(st.integers(0, len(mine)))
        lost = [*mine[:num_lost], *(ref for ref in mine[num_lost:] if ref in self.damaged)]
        assert self.table.announce(holder, [ref for ref in mine[num_lost:] if ref not in self.damaged]) == []
        for ref in lost:
            self.lose(holder, ref)
        self.mirror()

    @precondition(lambda self: any(held.total() > 1 for held in self.held.values()))
    @rule()
    def claims_of_others_slots_being_written_are_void(self) -> None:
        for holder in self.callers:
            for other in self.callers:
                if other != holder and self.writing(other):
                    claimed = [*self.held[holder].elements(), self.writing(other)[0]]
                    claimed = [ref for ref in claimed if ref not in self.damaged]
                    if any(ref in self.damaged for ref in self.held[holder].elements()):
                        continue
                    self.moved.pop(holder, None)
                    assert self.table.announce(holder, claimed) == [self.writing(other)[0]]

    @invariant()
    def laws_hold(self) -> None:
        self.table.check_integrity()
        counts = self.table.counts()
        assert counts.free + counts.writing + counts.leased + counts.cached == counts.total == NUM_SLOTS

    @invariant()
    def what_a_live_holder_holds_is_untouched(self) -> None:
        for held in self.held.values():
            for ref in held.elements():
                header = self.headers[ref.arena_id]
                assert header.generation == ref.generation
                if ref in self.complete.values():
                    assert header.state is SlotState.COMPLETE
                elif ref in self.damaged:
                    assert header.state is SlotState.DAMAGED
                else:
                    assert header.state is SlotState.WRITING

    @invariant()
    def records_are_found_as_the_model_says(self) -> None:
        assert {key: ref for key in KEYS if (ref := self.table.find(key)) is not None} == self.complete

    def teardown(self) -> None:
        for holder in list(self.held):
            self.table.drop_holder(holder)
        counts = self.table.counts()
        assert (counts.writing, counts.leased) == (0, 0), "something leaked"
        assert counts.cached == len(self.complete)


LeaseMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLeaseMachine = LeaseMachine.TestCase
