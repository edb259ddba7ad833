# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton resolve_rows: one program a sequence."""

import triton.language as tl
from torch import Tensor

from forepage_kernels.jit import jit_unspecialised, next_power_of_2, on_device_of


def resolve_rows(
    selected: Tensor,
    row_table: Tensor,
    *,
    staging: Tensor,
    records: Tensor,
    plane_offset: int,
    block_entries: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the package; the fields of Resolved."""
    batch, count = selected.shape
    slots, pull_slots, offsets, entries = selected.new_empty(4, batch, count)
    pulled, unserved = selected.new_empty(2, batch)
    if batch:
        with on_device_of(selected):
            resolve[(batch,)](
                selected,
                row_table,
                staging,
                records,
                slots,
                pull_slots,
                offsets,
                entries,
                pulled,
                unserved,
                count,
                row_table.shape[1],
                staging.shape[1],
                plane_offset,
                ENTRIES=block_entries,
                TILE=min(1024, max(32, next_power_of_2(max(1, count)))),
            )
    return slots, pull_slots.view(-1), offsets.view(-1), entries.view(-1), pulled, unserved


@jit_unspecialised("count", "num_blocks", "num_staging", "plane_offset")
def resolve(
    selected: tl.tensor,
    row_table: tl.tensor,
    staging: tl.tensor,
    records: tl.tensor,
    slots: tl.tensor,
    pull_slots: tl.tensor,
    offsets: tl.tensor,
    entries: tl.tensor,
    pulled: tl.tensor,
    unserved: tl.tensor,
    count: tl.tensor,
    num_blocks: tl.tensor,
    num_staging: tl.tensor,
    plane_offset: tl.tensor,
    ENTRIES: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Shapes as in the package; what lies past a table's end is not there."""
    row = tl.program_id(0).to(tl.int64)
    num_pulled = tl.full([], 0, tl.int64)
    num_unserved = tl.full([], 0, tl.int64)
    for start in range(0, count, TILE):
        place = start + tl.arange(0, TILE).to(tl.int64)
        inside = place < count
        entry = tl.load(selected + row * count + place, mask=inside, other=-1)
        wanted = entry >= 0
        block = tl.where(wanted, entry, 0) // ENTRIES
        known = wanted & (block < num_blocks)
        block_id = tl.load(row_table + row * num_blocks + block, mask=known, other=-1).to(tl.int64)
        offset = tl.load(records + row * num_blocks + block, mask=known, other=-1)
        staged_id = tl.load(
            staging + row * num_staging + place // ENTRIES,
            mask=inside & (place // ENTRIES < num_staging),
            other=-1,
        )
        absent = wanted & (block_id < 0)
        pullable = absent & (staged_id >= 0) & (offset >= 0)
        within = tl.where(wanted, entry, 0) % ENTRIES
        staged = staged_id * ENTRIES + place % ENTRIES
        slot = tl.where(pullable, staged, tl.where(block_id >= 0, block_id * ENTRIES + within, -1))
        at = row * count + place
        tl.store(slots + at, slot, mask=inside)
        tl.store(pull_slots + at, tl.where(pullable, staged, -1), mask=inside)
        tl.store(offsets + at, offset + plane_offset, mask=inside)
        tl.store(entries + at, within, mask=inside)
        num_pulled += tl.sum(pullable.to(tl.int64), axis=0)
        num_unserved += tl.sum((absent & (pullable == 0)).to(tl.int64), axis=0)
    tl.store(pulled + row, num_pulled)
    tl.store(unserved + row, num_unserved)
