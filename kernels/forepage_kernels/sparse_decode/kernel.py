# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton sparse_decode: a program walks a fixed part of one sequence's rows, and a second kernel joins parts.

The rows are those of the window's list and then those of the compressed one, in tiles; a part has as many
whatever the batch is, and parts are joined in their order, with no atomics: the result depends only on
the attended rows in list order, not on where they lie nor on what else is decoded. A row is decoded once a
tile and serves as key and value; bf16 holds it exactly (e4m3 times a power of two, and bf16 rope dims).
"""

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from forepage_kernels.jit import is_interpreted, jit, jit_unspecialised, next_power_of_2, on_device_of
from forepage_kernels.layout import LANE_BYTES, SCALE_GROUP, RowPool
from forepage_kernels.row_tile import decode_row_tile, load_bf16_row_tile

MIN_HEADS = 16
"""The smallest side of a matrix product on tensor cores."""
VECTOR_BYTES = 16
"""The widest load; a pool whose spans begin elsewhere is read in lanes."""
HOPPER = 9
"""Major compute capability."""
OVERLAPPED_DIMS = (448, 64)
"""What `hopper.py` is written for."""


@dataclass(frozen=True)
class Tile:
    """What a program works on: at most so many heads, and parts of so many rows, in tiles.

    A row is decoded once for all heads of a program (docs/kernels.md). `overlapped`: by `hopper.py`.
    """

    heads: int
    rows: int
    part_rows: int
    overlapped: bool = False


FP32_TILE = Tile(heads=16, rows=16, part_rows=320)
"""A tile of 512-wide fp32 rows is split into three tf32 parts: 16 is what shared memory holds."""
BF16_TILE = Tile(heads=64, rows=64, part_rows=320)
"""A part is half of what a c4 layer of V4-Flash attends."""
OVERLAPPED_TILE = Tile(heads=64, rows=64, part_rows=320, overlapped=True)
"""Parts of 640 rows need no join, and are faster from 85 sequences on; those of 320 up to 64, and by more."""


def sparse_decode(
    q: Tensor,
    compressed: RowPool | None,
    compressed_slots: Tensor,
    window: RowPool,
    window_slots: Tensor,
    sinks: Tensor,
    *,
    softmax_scale: float,
    tile: Tile | None = None,
) -> Tensor:
    """See the package; fp8 rows. A slot past its pool counts as absent. `tile`: None takes the best."""
    batch, heads, dims = q.shape
    out = torch.empty_like(q)
    if out.numel() == 0:
        return out
    first = window if compressed is None else compressed
    if tile is None:
        tile = tile_of(q, first, window)
    tiles = -(-compressed_slots.shape[1] // tile.rows) - (-window_slots.shape[1] // tile.rows)
    parts = max(1, -(-tiles * tile.rows // tile.part_rows))
    partial = q.new_empty(batch, parts, heads, dims if parts > 1 else 0, dtype=torch.float32)
    sums = q.new_empty(batch, parts, 2, heads if parts > 1 else 0, dtype=torch.float32)
    arguments = (
        q,
        first.bytes,
        compressed_slots,
        window.bytes,
        window_slots,
        sinks,
        out,
        partial,
        sums,
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
    )
    with on_device_of(q):
        launch = _attend_overlapped if tile.overlapped else _attend
        launch(arguments, q, first, window, tile, parts)
        if parts > 1:
            block_d = max(SCALE_GROUP, next_power_of_2(dims))
            join_parts[(heads, batch)](
                partial, sums, sinks, out, heads, parts, DIMS=dims, BLOCK_D=block_d, num_warps=2
            )
    return out


def tile_of(q: Tensor, compressed: RowPool, window: RowPool) -> Tile:
    """By the kind of GPU and of pools alone."""
    if q.dtype != torch.bfloat16:
        return FP32_TILE
    layout = window.layout
    fits = (layout.nope_dims, layout.rope_dims) == OVERLAPPED_DIMS and all(
        _is_aligned(pool) and pool.layout.entries.bit_count() == 1 for pool in (compressed, window)
    )
    is_hopper = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == HOPPER
    return OVERLAPPED_TILE if fits and is_hopper else BF16_TILE


def _attend_overlapped(
    arguments: tuple[object, ...], q: Tensor, first: RowPool, window: RowPool, tile: Tile, parts: int
) -> None:
    from forepage_kernels.sparse_decode.hopper import NUM_WARPS, attend_overlapped

    attend_overlapped[(parts, -(-q.shape[1] // tile.heads), q.shape[0])](
        *arguments,
        LOG_ENTRIES=first.layout.entries.bit_length() - 1,
        LOG_WINDOW_ENTRIES=window.layout.entries.bit_length() - 1,
        PART_TILES=tile.part_rows // tile.rows,
        WHOLE=parts == 1,
        num_warps=NUM_WARPS,
    )


def _attend(
    arguments: tuple[object, ...], q: Tensor, first: RowPool, window: RowPool, tile: Tile, parts: int
) -> None:
    batch, heads, dims = q.shape
    block_h = max(MIN_HEADS, min(tile.heads, next_power_of_2(heads)))
    attend[(parts, -(-heads // block_h), batch)](
        *arguments,
        ENTRIES=first.layout.entries,
        WINDOW_ENTRIES=window.layout.entries,
        NOPE=window.layout.nope_dims,
        DIMS=dims,
        SCALE_BYTES=window.layout.scale_bytes,
        BLOCK_D=max(SCALE_GROUP, next_power_of_2(dims)),
        BLOCK_H=block_h,
        BLOCK_N=tile.rows,
        PART_TILES=tile.part_rows // tile.rows,
        ALIGN=VECTOR_BYTES if _is_aligned(first) and _is_aligned(window) else LANE_BYTES,
        WHOLE=parts == 1,
        BF16=q.dtype == torch.bfloat16 and not is_interpreted(),
        num_warps=8,
        num_stages=1,
    )


def _is_aligned(pool: RowPool) -> bool:
    """Whether every row begins on the widest load's multiple."""
    layout = pool.layout
    strides = (pool.bytes.data_ptr(), pool.block_bytes, pool.layer_offset, layout.value_bytes)
    return not any(stride % VECTOR_BYTES for stride in strides)


@jit_unspecialised("num_rows", "num_window", "pool_slots", "window_pool_slots")
def attend(
    q: tl.tensor,
    pool: tl.tensor,
    slots: tl.tensor,
    window: tl.tensor,
    window_slots: tl.tensor,
    sinks: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    sums: tl.tensor,
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
    PART_TILES: tl.constexpr,
    ALIGN: tl.constexpr,
    WHOLE: tl.constexpr,
    BF16: tl.constexpr,
) -> None:
    """Shapes as in the package; rows beyond the lists' ends and negative slots are never read.

    A part that is not WHOLE leaves partial f32 [B, parts, H, d], not yet divided, and sums f32
    [B, parts, 2, H]: the largest score and the sum of weights. A tile belongs to one list: the window's
    are the first.
    """
    row = tl.program_id(2).to(tl.int64)
    part = tl.program_id(0)
    value_bytes: tl.constexpr = NOPE + 2 * (DIMS - NOPE)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dim = tl.arange(0, BLOCK_D)
    inside = (head < heads)[:, None] & (dim < DIMS)[None, :]
    # 32-bit places behind a scalar base: 64-bit ones, kept over the loop, took half the registers.
    place = head[:, None] * DIMS + dim[None, :]
    query = tl.load(q + row * heads * DIMS + place, mask=inside, other=0.0)
    if not BF16:
        query = query.to(tl.float32)
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    window_tiles = tl.cdiv(num_window, BLOCK_N)
    last = tl.minimum((part + 1) * PART_TILES, window_tiles + tl.cdiv(num_rows, BLOCK_N))
    for tile in range(part * PART_TILES, last):
        # One loop over both lists: in two, values of the first are kept in registers over the second.
        is_window = tile < window_tiles
        index = (tile - tl.where(is_window, 0, window_tiles)) * BLOCK_N + tl.arange(0, BLOCK_N)
        listed = tl.where(is_window, window_slots + row * num_window, slots + row * num_rows)
        slot = tl.load(listed + index, mask=index < tl.where(is_window, num_window, num_rows), other=-1)
        present = (slot >= 0) & (slot < tl.where(is_window, window_pool_slots, pool_slots))
        slot = tl.where(present, slot, 0)
        block = tl.where(is_window, slot // WINDOW_ENTRIES, slot // ENTRIES)
        entry = tl.where(is_window, slot % WINDOW_ENTRIES, slot % ENTRIES)
        plane = block * tl.where(is_window, window_block_bytes, pool_block_bytes)
        plane = tl.multiple_of(plane + tl.where(is_window, window_offset, pool_offset), ALIGN)
        entries = tl.where(is_window, WINDOW_ENTRIES, ENTRIES)
        base = tl.where(is_window, window, pool)
        value = tl.multiple_of(base + tl.multiple_of(plane + entry * value_bytes, ALIGN), ALIGN)
        scale = base + tl.multiple_of(plane + entries * value_bytes + entry * SCALE_BYTES, 8)
        if BF16 and SCALE_BYTES == 8:
            rows = load_bf16_row_tile(value, scale, present, NOPE, DIMS, BLOCK_D)
        else:
            rows = decode_row_tile(value, scale, present, NOPE, DIMS, BLOCK_D)
        top, total, acc = attend_tile(query, rows, present, softmax_scale, top, total, acc, BF16)
    if WHOLE:
        result = with_sink(
            acc, top[:, None], total[:, None], tl.load(sinks + head, mask=head < heads)[:, None]
        )
        tl.store(out + row * heads * DIMS + place, result.to(out.dtype.element_ty), mask=inside)
    else:
        at = row * tl.num_programs(0) + part
        tl.store(partial + at * heads * DIMS + place, acc, mask=inside)
        tl.store(sums + at * 2 * heads + head, top, mask=head < heads)
        tl.store(sums + (at * 2 + 1) * heads + head, total, mask=head < heads)


@jit
def attend_tile(
    query: tl.tensor,
    rows: tl.tensor,
    present: tl.tensor,
    softmax_scale: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    BF16: tl.constexpr,
) -> tl.tensor:
    """One step of the online softmax: query [H, D], rows [N, D], present bool [N]; a tile may be empty."""
    if BF16:
        rows = rows.to(tl.bfloat16)
    scores = tl.dot(query, tl.trans(rows), input_precision="tf32x3") * softmax_scale  # [H, N]
    scores = tl.where(present[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(new_top > float("-inf"), new_top, 0.0)
    keep = tl.exp(top - base)
    p = tl.exp(scores - base[:, None])
    total = total * keep + tl.sum(p, axis=1)
    if BF16:
        p = p.to(tl.bfloat16)
    acc = tl.dot(p, rows, acc * keep[:, None], input_precision="tf32x3")
    return new_top, total, acc


@jit_unspecialised("parts")
def join_parts(
    partial: tl.tensor,
    sums: tl.tensor,
    sinks: tl.tensor,
    out: tl.tensor,
    heads: tl.tensor,
    parts: tl.tensor,
    DIMS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One head of one sequence: its parts in order, then the sink. Shapes as `attend` leaves them."""
    row = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0)
    dim = tl.arange(0, BLOCK_D)
    top = -float("inf")
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for part in range(parts):
        at = row * parts + part
        part_top = tl.load(sums + at * 2 * heads + head)
        part_total = tl.load(sums + (at * 2 + 1) * heads + head)
        read = dim < tl.where(part_top > -float("inf"), DIMS, 0)  # an empty part's values may be NaN
        values = tl.load(partial + (at * heads + head) * DIMS + dim, mask=read, other=0.0)
        new_top = tl.maximum(top, part_top)
        base = tl.where(new_top > -float("inf"), new_top, 0.0)
        keep = tl.exp(top - base)
        weight = tl.exp(part_top - base)
        acc = acc * keep + values * weight
        total = total * keep + part_total * weight
        top = new_top
    result = with_sink(acc, top, total, tl.load(sinks + head))
    tl.store(out + (row * heads + head) * DIMS + dim, result.to(out.dtype.element_ty), mask=dim < DIMS)


@jit
def with_sink(acc: tl.tensor, top: tl.tensor, total: tl.tensor, sink: tl.tensor) -> tl.tensor:
    """The weighted sum over all weights and the sink's; zeros where no row was attended."""
    attended = top > -float("inf")
    total += tl.exp(tl.where(attended, sink - top, 0.0))
    return tl.where(attended, acc / total, 0.0)
