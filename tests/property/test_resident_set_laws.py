"""Whatever is promised, taken, loaded, dropped and ended: no block is lost and none has two owners."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forepage.errors import IntegrityError
from forepage.kv.block_allocator import BlockAllocator
from forepage.kv.resident_set import ResidentSet

TOTAL = 24


class ResidencyMachine(RuleBasedStateMachine):
    """One pool each of rows and keys, a few sequences, random commits."""

    @initialize()
    def start(self) -> None:
        self.rows = BlockAllocator("rows", TOTAL, reserve=4)
        self.keys = BlockAllocator("keys", TOTAL, reserve=4)
        self.sets: list[ResidentSet] = []
        self.promises: list[int] = []

    @rule(blocks=st.integers(1, 10), use_reserve=st.booleans())
    def admit(self, blocks: int, use_reserve: bool) -> None:
        room = self.rows.total - (0 if use_reserve else self.rows.reserve)
        fits = self.rows.promised + blocks <= room
        assert self.rows.try_promise(blocks, use_reserve=use_reserve) is fits
        if not fits:
            return
        assert self.keys.try_promise(blocks, use_reserve=use_reserve)
        resident = ResidentSet()
        for row, key in zip(self.rows.allocate(blocks), self.keys.allocate(blocks), strict=True):
            resident.append(row, key)
        self.sets.append(resident)
        self.promises.append(blocks)

    @precondition(lambda self: self.sets)
    @rule(data=st.data())
    def drop_and_reload(self, data: st.DataObject) -> None:
        resident = data.draw(st.sampled_from(self.sets))
        pinned = data.draw(st.integers(resident.pinned_from, resident.num_blocks))
        held = [idx for idx in resident.row_id_by_block if idx < pinned]
        absent = [idx for idx in range(pinned) if idx not in resident.row_id_by_block]
        drop = data.draw(st.lists(st.sampled_from(held), unique=True)) if held else []
        load = data.draw(st.lists(st.sampled_from(absent), unique=True)) if absent else []
        rows = dict(zip(load, self.rows.allocate(len(load)), strict=True))
        keys = dict(zip(load, self.keys.allocate(len(load)), strict=True))
        freed = resident.commit(
            pinned_from=pinned, loaded_rows=rows, loaded_keys=keys, drop_rows=drop, drop_keys=drop
        )
        self.rows.free(freed.row_ids)
        self.keys.free(freed.key_ids)

    @precondition(lambda self: self.sets)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.sets) - 1))
        freed = self.sets.pop(at).clear()
        promise = self.promises.pop(at)
        self.rows.free(freed.row_ids)
        self.keys.free(freed.key_ids)
        self.rows.try_promise(-promise)
        self.keys.try_promise(-promise)

    @invariant()
    def laws_hold(self) -> None:
        self.rows.check_integrity()
        self.keys.check_integrity()
        for resident in self.sets:
            resident.check_integrity()
        row_ids = [row for resident in self.sets for row in resident.row_id_by_block.values()]
        assert len(row_ids) == len(set(row_ids)) == self.rows.num_held
        assert self.rows.num_free + self.rows.num_held == TOTAL

    def teardown(self) -> None:
        while self.sets:
            freed = self.sets.pop().clear()
            self.rows.free(freed.row_ids)
            self.rows.try_promise(-self.promises.pop())
        assert self.rows.num_held == self.rows.promised == 0


TestResidency = ResidencyMachine.TestCase
TestResidency.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_freeing_twice_is_refused() -> None:
    pool = BlockAllocator("rows", 4)
    pool.try_promise(1)
    ids = pool.allocate(1)
    pool.free(ids)
    with pytest.raises(IntegrityError, match="not held"):
        pool.free(ids)


def test_taking_more_than_promised_is_refused() -> None:
    pool = BlockAllocator("rows", 4)
    pool.try_promise(1)
    with pytest.raises(IntegrityError, match="promised"):
        pool.allocate(2)


def test_dropping_an_always_resident_block_is_refused() -> None:
    resident = ResidentSet()
    resident.append(0, 0)
    with pytest.raises(IntegrityError, match="always-resident"):
        resident.commit(pinned_from=0, loaded_rows={}, loaded_keys={}, drop_rows=[0], drop_keys=[0])
