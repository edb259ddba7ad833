# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton gather_blocks: each program copies one tile of one block."""

import torch
import triton.language as tl
from torch import Tensor

from forepage_kernels.jit import jit, on_device_of
from forepage_kernels.layout import LANE_BYTES

TILE_LANES = 1024
"""8 KB a program: enough bytes in flight for PCIe, enough programs for a single block."""


def gather_blocks(pool: Tensor, arena: Tensor, *, block_ids: Tensor, arena_offsets: Tensor) -> None:
    """See the package; out-of-range ids and offsets move nothing."""
    block_lanes = pool.shape[1] // LANE_BYTES
    num_blocks, arena_lanes = pool.shape[0], arena.shape[0] // LANE_BYTES
    if block_ids.shape[0] == 0 or num_blocks == 0:
        return
    with on_device_of(pool):
        copy_blocks[(block_ids.shape[0], -(-block_lanes // TILE_LANES))](
            pool.view(torch.int64),
            arena[: arena_lanes * LANE_BYTES].view(torch.int64),
            block_ids,
            arena_offsets,
            num_blocks,
            block_lanes,
            arena_lanes,
            TILE=TILE_LANES,
        )


@jit
def copy_blocks(
    pool: tl.tensor,
    arena: tl.tensor,
    block_ids: tl.tensor,
    arena_offsets: tl.tensor,
    num_blocks: tl.tensor,
    block_lanes: tl.tensor,
    arena_lanes: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Lanes are 8 bytes; two at a time (16 bytes) where both ends allow it."""
    copy = tl.program_id(0)
    block_id = tl.load(block_ids + copy)
    offset = tl.load(arena_offsets + copy)
    source = offset // 8
    inside = (block_id >= 0) & (block_id < num_blocks)
    if inside & (offset >= 0) & (source + block_lanes <= arena_lanes):
        target = block_id * block_lanes
        lane = tl.program_id(1) * TILE + tl.arange(0, TILE)
        if (source | target | block_lanes) % 2 == 0:
            # Written as doubles, the compiler sees 16-byte alignment and moves two lanes a load.
            copy_lanes(pool + target // 2 * 2, arena + source // 2 * 2, lane, block_lanes // 2 * 2)
        else:
            copy_lanes(pool + target, arena + source, lane, block_lanes)


@jit
def copy_lanes(target: tl.tensor, source: tl.tensor, lane: tl.tensor, count: tl.tensor) -> None:
    """Copy those of `lane` that are below `count`."""
    tl.store(target + lane, tl.load(source + lane, mask=lane < count), mask=lane < count)
