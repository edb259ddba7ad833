# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton sparse_decode: one program a (sequence, head tile) walks both slot lists in order.

The walk is a fixed sequence of row tiles, with no split and no atomics: the result depends only on
the attended rows in list order, not on where they lie. A row is decoded once a tile and serves as key
and value; bf16 holds it exactly (e4m3 times a power of two, and bf16 rope dims).
"""

import torch
import triton.language as tl
from torch import Tensor

from forepage_kernels.jit import is_interpreted, jit, jit_unspecialised, next_power_of_2, on_device_of
from forepage_kernels.layout import SCALE_GROUP, RowPool
from forepage_kernels.row_tile import load_row_tile

MIN_HEADS = 16
"""The smallest side of a matrix product on tensor cores."""
TILE_HEADS = {torch.float32: 16, torch.bfloat16: 64}
"""A row is decoded once for all heads of a program (docs/kernels.md)."""
TILE_ROWS = {torch.float32: 16, torch.bfloat16: 64}
"""A tile of 512-wide fp32 rows is split into three tf32 parts: 16 is what shared memory holds."""


def sparse_decode(
    q: Tensor,
    compressed: RowPool | None,
    compressed_slots: Tensor,
    window: RowPool,
    window_slots: Tensor,
    sinks: Tensor,
    *,
    softmax_scale: float,
) -> Tensor:
    """See the package; fp8 rows. A slot past its pool counts as absent."""
    batch, heads, dims = q.shape
    out = torch.empty_like(q)
    if out.numel() == 0:
        return out
    first = window if compressed is None else compressed
    block_h = max(MIN_HEADS, min(TILE_HEADS[q.dtype], next_power_of_2(heads)))
    with on_device_of(q):
        attend[(-(-heads // block_h), batch)](
            q,
            first.bytes,
            compressed_slots,
            window.bytes,
            window_slots,
            sinks,
            out,
            softmax_scale,
            heads,
            compressed_slots.shape[1],
            window_slots.shape[1],
            first.num_slots,
            first.block_bytes,
            first.layer_offset,
            window.num_slots,
            window.block_bytes,
            window.layer_offset,
            ENTRIES=first.layout.entries,
            WINDOW_ENTRIES=window.layout.entries,
            NOPE=window.layout.nope_dims,
            DIMS=dims,
            SCALE_BYTES=window.layout.scale_bytes,
            BLOCK_D=max(SCALE_GROUP, next_power_of_2(dims)),
            BLOCK_H=block_h,
            BLOCK_N=TILE_ROWS[q.dtype],
            BF16=q.dtype == torch.bfloat16 and not is_interpreted(),
            num_warps=8,
        )
    return out


@jit_unspecialised("num_rows", "num_window", "pool_slots", "window_pool_slots")
def attend(
    q: tl.tensor,
    pool: tl.tensor,
    slots: tl.tensor,
    window: tl.tensor,
    window_slots: tl.tensor,
    sinks: tl.tensor,
    out: tl.tensor,
    softmax_scale: tl.tensor,
    heads: tl.tensor,
    num_rows: tl.tensor,
    num_window: tl.tensor,
    pool_slots: tl.tensor,
    pool_block_bytes: tl.tensor,
    pool_offset: tl.tensor,
    window_pool_slots: tl.tensor,
    window_block_bytes: tl.tensor,
    window_offset: tl.tensor,
    ENTRIES: tl.constexpr,
    WINDOW_ENTRIES: tl.constexpr,
    NOPE: tl.constexpr,
    DIMS: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BF16: tl.constexpr,
) -> None:
    """Shapes as in the package; rows beyond the lists' ends and negative slots are never read."""
    row = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    dim = tl.arange(0, BLOCK_D)
    inside = (head < heads)[:, None] & (dim < DIMS)[None, :]
    place = (row * heads + head)[:, None] * DIMS + dim[None, :]
    query = tl.load(q + place, mask=inside, other=0.0)
    if not BF16:
        query = query.to(tl.float32)
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for start in range(0, num_rows, BLOCK_N):
        slot = load_slots(slots + row * num_rows, start, num_rows, pool_slots, BLOCK_N)
        rows = load_row_tile(
            pool, slot, pool_block_bytes, pool_offset, ENTRIES, NOPE, DIMS, SCALE_BYTES, BLOCK_D
        )
        top, total, acc = attend_tile(query, rows, slot, softmax_scale, top, total, acc, BF16)
    for start in range(0, num_window, BLOCK_N):
        slot = load_slots(window_slots + row * num_window, start, num_window, window_pool_slots, BLOCK_N)
        rows = load_row_tile(
            window, slot, window_block_bytes, window_offset, WINDOW_ENTRIES, NOPE, DIMS, SCALE_BYTES, BLOCK_D
        )
        top, total, acc = attend_tile(query, rows, slot, softmax_scale, top, total, acc, BF16)
    sink = tl.load(sinks + head, mask=head < heads, other=0.0)
    attended = top > float("-inf")
    total += tl.exp(tl.where(attended, sink - top, 0.0))
    result = tl.where(attended[:, None], acc / total[:, None], 0.0)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


@jit
def load_slots(
    slots: tl.tensor, start: tl.tensor, count: tl.tensor, pool_slots: tl.tensor, BLOCK_N: tl.constexpr
) -> tl.tensor:
    """The next BLOCK_N slots i64, -1 where there is none."""
    index = start + tl.arange(0, BLOCK_N)
    slot = tl.load(slots + index, mask=index < count, other=-1)
    return tl.where((slot >= 0) & (slot < pool_slots), slot, -1)


@jit
def attend_tile(
    query: tl.tensor,
    rows: tl.tensor,
    slot: tl.tensor,
    softmax_scale: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    BF16: tl.constexpr,
) -> tl.tensor:
    """One step of the online softmax: query [H, D], rows f32 [N, D], slot i64 [N]; a tile may be empty."""
    if BF16:
        rows = rows.to(tl.bfloat16)
    scores = tl.dot(query, tl.trans(rows), input_precision="tf32x3") * softmax_scale  # [H, N]
    scores = tl.where((slot >= 0)[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(new_top > float("-inf"), new_top, 0.0)
    keep = tl.exp(top - base)
    p = tl.exp(scores - base[:, None])
    total = total * keep + tl.sum(p, axis=1)
    if BF16:
        p = p.to(tl.bfloat16)
    acc = tl.dot(p, rows, acc * keep[:, None], input_precision="tf32x3")
    return new_top, total, acc
