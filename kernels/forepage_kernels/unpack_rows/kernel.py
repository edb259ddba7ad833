# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton unpack_rows: each program decodes one tile of entries."""

import torch
import triton.language as tl
from torch import Tensor

from forepage_kernels.codec import load_e4m3, load_f32, load_mxfp4, plane_base
from forepage_kernels.jit import jit, jit_unspecialised, next_power_of_2, on_device_of
from forepage_kernels.layout import SCALE_GROUP, KeyPool, RowPool
from forepage_kernels.row_tile import load_row_tile

TILE_VALUES = 8192
"""Values a program decodes: 64 in each of its threads."""


def unpack_rows(pool: RowPool | KeyPool, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """See the package; quantised pools. A slot past the pool counts as absent."""
    layout, num_rows = pool.layout, slots.shape[0]
    out = torch.empty(num_rows, layout.dims, dtype=dtype, device=slots.device)
    if out.numel() == 0:
        return out
    block_d = max(SCALE_GROUP, next_power_of_2(layout.dims))
    tile = max(1, TILE_VALUES // block_d)
    with on_device_of(slots):
        if isinstance(pool, RowPool):
            unpack_row_tile[(-(-num_rows // tile),)](
                pool.bytes,
                slots,
                out,
                num_rows,
                pool.num_slots,
                pool.block_bytes,
                pool.layer_offset,
                ENTRIES=layout.entries,
                NOPE=pool.layout.nope_dims,
                DIMS=layout.dims,
                SCALE_BYTES=layout.scale_bytes,
                BLOCK_D=block_d,
                TILE=tile,
            )
        else:
            unpack_key_tile[(-(-num_rows // tile),)](
                pool.bytes,
                slots,
                out,
                num_rows,
                pool.num_slots,
                pool.block_bytes,
                pool.layer_offset,
                ENTRIES=layout.entries,
                DIMS=layout.dims,
                VALUE_BYTES=layout.value_bytes,
                SCALE_BYTES=layout.scale_bytes,
                TILE=tile,
                MXFP4=layout.format == "mxfp4",
            )
    return out


@jit_unspecialised("num_rows", "num_slots")
def unpack_row_tile(
    pool: tl.tensor,
    slots: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    num_slots: tl.tensor,
    block_bytes: tl.tensor,
    layer_offset: tl.tensor,
    ENTRIES: tl.constexpr,
    NOPE: tl.constexpr,
    DIMS: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """fp8 rows -> out f32|bf16 [num_rows, DIMS]."""
    row, slot = load_tile_slots(slots, num_rows, num_slots, TILE)
    values = load_row_tile(pool, slot, block_bytes, layer_offset, ENTRIES, NOPE, DIMS, SCALE_BYTES, BLOCK_D)
    dim = tl.arange(0, BLOCK_D)[None, :]
    store = row[:, None] * DIMS + dim
    tl.store(out + store, values.to(out.dtype.element_ty), mask=(row < num_rows)[:, None] & (dim < DIMS))


@jit_unspecialised("num_rows", "num_slots")
def unpack_key_tile(
    pool: tl.tensor,
    slots: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    num_slots: tl.tensor,
    block_bytes: tl.tensor,
    layer_offset: tl.tensor,
    ENTRIES: tl.constexpr,
    DIMS: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    TILE: tl.constexpr,
    MXFP4: tl.constexpr,
) -> None:
    """fp8 or mxfp4 keys -> out f32|bf16 [num_rows, DIMS]."""
    row, slot = load_tile_slots(slots, num_rows, num_slots, TILE)
    present = slot >= 0
    plane = plane_base(slot, block_bytes, layer_offset, ENTRIES)
    value = tl.multiple_of(plane + (slot % ENTRIES) * VALUE_BYTES, 8)
    scale = plane + ENTRIES * VALUE_BYTES + (slot % ENTRIES) * SCALE_BYTES
    dim = tl.arange(0, DIMS)[None, :]
    if MXFP4:
        values, _ = load_mxfp4(pool + value, pool + scale, present, TILE, DIMS)
    else:
        values = load_e4m3(pool + value[:, None] + dim, present[:, None])
        values = values * load_f32(pool + scale, present)[:, None]
    tl.store(out + row[:, None] * DIMS + dim, values.to(out.dtype.element_ty), mask=(row < num_rows)[:, None])


@jit
def load_tile_slots(
    slots: tl.tensor, num_rows: tl.tensor, num_slots: tl.tensor, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """This program's rows i64 [TILE] and their slots, -1 where there is none."""
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    slot = tl.load(slots + row, mask=row < num_rows, other=-1)
    return row, tl.where((slot >= 0) & (slot < num_slots), slot, -1)
