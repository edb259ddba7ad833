# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton gather_rows: each program copies one row, values and scales in one load."""

import torch
import triton.language as tl
from torch import Tensor

from forepage_kernels.codec import plane_base
from forepage_kernels.jit import jit, next_power_of_2, on_device_of
from forepage_kernels.layout import LANE_BYTES, RowPool


def gather_rows(
    pool: RowPool, arena: Tensor, *, slots: Tensor, plane_offsets: Tensor, entries: Tensor
) -> None:
    """See the package; out-of-range slots and offsets move nothing."""
    layout = pool.layout
    value_lanes, scale_lanes = layout.value_bytes // LANE_BYTES, layout.scale_bytes // LANE_BYTES
    arena_lanes = arena.shape[0] // LANE_BYTES
    if slots.shape[0] == 0:
        return
    with on_device_of(pool.bytes):
        copy_rows[(slots.shape[0],)](
            pool.bytes.view(torch.int64),
            arena[: arena_lanes * LANE_BYTES].view(torch.int64),
            slots,
            plane_offsets,
            entries,
            pool.num_slots,
            pool.block_bytes,
            pool.layer_offset,
            arena_lanes,
            ENTRIES=layout.entries,
            VALUE_LANES=value_lanes,
            SCALE_LANES=scale_lanes,
            TILE=next_power_of_2(value_lanes + scale_lanes),
        )


@jit
def copy_rows(
    pool: tl.tensor,
    arena: tl.tensor,
    slots: tl.tensor,
    plane_offsets: tl.tensor,
    entries: tl.tensor,
    num_slots: tl.tensor,
    block_bytes: tl.tensor,
    layer_offset: tl.tensor,
    arena_lanes: tl.tensor,
    ENTRIES: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    SCALE_LANES: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """A lane is 8 bytes: the first VALUE_LANES of a row are its values, the rest its scales."""
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    offset = tl.load(plane_offsets + row)
    source = offset // 8
    entry = tl.load(entries + row)
    plane_lanes = ENTRIES * (VALUE_LANES + SCALE_LANES)
    inside = (slot >= 0) & (slot < num_slots) & (entry >= 0) & (entry < ENTRIES)
    if inside & (offset >= 0) & (source + plane_lanes <= arena_lanes):
        target = plane_base(slot, block_bytes, layer_offset, ENTRIES) // 8
        lane = tl.arange(0, TILE)
        scale_lane = lane - VALUE_LANES
        from_lane = tl.where(
            scale_lane < 0,
            entry * VALUE_LANES + lane,
            ENTRIES * VALUE_LANES + entry * SCALE_LANES + scale_lane,
        )
        place = slot % ENTRIES
        to_lane = tl.where(
            scale_lane < 0,
            place * VALUE_LANES + lane,
            ENTRIES * VALUE_LANES + place * SCALE_LANES + scale_lane,
        )
        mask = lane < VALUE_LANES + SCALE_LANES
        tl.store(pool + target + to_lane, tl.load(arena + source + from_lane, mask=mask), mask=mask)
