# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Gluon sparse_decode for Hopper: bf16 queries, rows of 448 fp8 and 64 bf16 dims, V4-Flash's and Pro's.

What `kernel.attend` does one after another overlaps here. There are two buffers of decoded rows: while one is
multiplied the next tile's codes are loaded and decoded into the other. Steps of a tile:

    tensor cores    p v of the tile before | q k of this tile     |               | p v of this tile ..
    threads         load the next tile     | decode the next tile | softmax       | load ..

Both products share the columns out over two warp groups, so nothing is computed twice. A step waits for all
products that are in flight, never for some of them: the compiler serialises them otherwise.
"""

from collections.abc import Callable
from typing import Any, cast

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from forepage_kernels.jit import Kernel

TILE_HEADS, TILE_ROWS, NUM_WARPS = 64, 64, 8
"""Both tiles are what a warp group's product and the shared memory (205 KB) allow."""
DIMS, NOPE, ROPE, VALUE_BYTES = (tl.constexpr(value) for value in (512, 448, 64, 576))
HEADS, ROWS = tl.constexpr(TILE_HEADS), tl.constexpr(TILE_ROWS)
LANES, LANE_WORDS = tl.constexpr(32), tl.constexpr(4)
"""A row is read by 32 lanes, 16 codes each: one load of four words, all of one scale."""
thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
"""Its name in triton 3.6, and since 3.7."""


def gluon_jit(*unspecialised: str) -> Callable[[Callable[..., Any]], Kernel]:
    """`jit_unspecialised` of Gluon, which has no interpreter."""

    def decorate(fn: Callable[..., Any]) -> Kernel:
        return cast(Kernel, gluon.jit(fn, do_not_specialize=list(unspecialised)))

    return decorate


@gluon_jit("num_rows", "num_window", "pool_slots", "window_pool_slots")
def attend_overlapped(
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
    LOG_ENTRIES: tl.constexpr,
    LOG_WINDOW_ENTRIES: tl.constexpr,
    PART_TILES: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """As `kernel.attend`; rows begin on multiples of 16, blocks have 2^LOG entries."""
    wide: tl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    codes_of: tl.constexpr = gl.BlockedLayout([1, 1, LANE_WORDS], [1, LANES, 1], [8, 1, 1], [2, 1, 0])
    rope_of: tl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    scores_of: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])
    acc_of: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16])
    shared: tl.constexpr = gl.NVMMASharedLayout(128, 16, 2)

    row = gl.program_id(2).to(gl.int64)
    part = gl.program_id(0)
    first_head = gl.program_id(1) * HEADS
    q_head = first_head + gl.arange(0, HEADS, gl.SliceLayout(1, wide))
    q_place = q_head[:, None] * DIMS + gl.arange(0, DIMS, gl.SliceLayout(0, wide))[None, :]
    query = gl.load(q + row * heads * DIMS + q_place, mask=(q_head < heads)[:, None], other=0.0)
    q_shared = gl.allocate_shared_memory(gl.bfloat16, [HEADS, DIMS], shared, query)
    rows_shared = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, DIMS], shared)
    p_shared = gl.allocate_shared_memory(gl.bfloat16, [HEADS, ROWS], shared)

    window_tiles = gl.cdiv(num_window, ROWS)
    first = part * PART_TILES
    last = gl.minimum(first + PART_TILES, window_tiles + gl.cdiv(num_rows, ROWS))
    lists = (
        slots + row * num_rows,
        window_slots + row * num_window,
        num_rows,
        num_window,
        pool_slots,
        window_pool_slots,
        window_tiles,
        last,
    )
    pools = (pool + pool_offset, window + window_offset, pool_block_bytes, window_block_bytes)
    top = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(1, scores_of))
    total = gl.full([HEADS], 0.0, gl.float32, gl.SliceLayout(1, scores_of))
    product = warpgroup_mma_init(gl.full([HEADS, DIMS], 0.0, gl.float32, acc_of))

    slot, rope_slot = both_slots(first, lists, codes_of, rope_of)
    codes, exponent, rope = load_tile(
        slot, rope_slot, first < window_tiles, pools, LOG_ENTRIES, LOG_WINDOW_ENTRIES, codes_of, rope_of
    )
    slot, rope_slot = both_slots(first + 1, lists, codes_of, rope_of)
    store_tile(codes, exponent, rope, rows_shared.index(0))
    for tile in range(first, last):
        rows = rows_shared.index((tile - first) & 1)
        codes, exponent, rope = load_tile(
            slot,
            rope_slot,
            tile + 1 < window_tiles,
            pools,
            LOG_ENTRIES,
            LOG_WINDOW_ENTRIES,
            codes_of,
            rope_of,
        )
        slot, rope_slot = both_slots(tile + 2, lists, codes_of, rope_of)
        present = listed_slots(tile, lists, gl.SliceLayout(0, scores_of)) >= 0
        acc = warpgroup_mma_wait(0, [product])
        fence_async_shared()
        thread_barrier()  # rows are stored, and nobody multiplies with the other buffer or with p any more
        zeros = gl.full([HEADS, ROWS], 0.0, gl.float32, scores_of)
        scores = warpgroup_mma(q_shared, rows.permute((1, 0)), zeros, use_acc=False, is_async=True)
        store_tile(codes, exponent, rope, rows_shared.index((tile - first + 1) & 1))
        scores = warpgroup_mma_wait(0, [scores]) * softmax_scale  # [H, N]
        scores = gl.where(present[None, :], scores, float("-inf"))
        new_top = gl.maximum(top, gl.max(scores, axis=1))
        base = gl.where(new_top > float("-inf"), new_top, 0.0)
        keep = gl.exp(top - base)
        p = gl.exp(scores - base[:, None])
        total = total * keep + gl.sum(p, axis=1)
        top = new_top
        p_shared.store(p.to(gl.bfloat16))
        acc = acc * gl.convert_layout(keep, gl.SliceLayout(1, acc_of))[:, None]
        fence_async_shared()
        thread_barrier()
        product = warpgroup_mma(p_shared, rows, acc, is_async=True)

    acc = warpgroup_mma_wait(0, [product])
    thread_barrier()  # what follows may use the buffers' memory
    top = gl.convert_layout(top, gl.SliceLayout(1, acc_of))
    total = gl.convert_layout(total, gl.SliceLayout(1, acc_of))
    head = first_head + gl.arange(0, HEADS, gl.SliceLayout(1, acc_of))
    place = head[:, None] * DIMS + gl.arange(0, DIMS, gl.SliceLayout(0, acc_of))[None, :]
    inside = head < heads
    if WHOLE:
        attended = top > float("-inf")
        sink = gl.load(sinks + head, mask=inside, other=0.0)
        total += gl.exp(gl.where(attended, sink - top, 0.0))
        acc = gl.where(attended[:, None], acc / total[:, None], 0.0)
        gl.store(out + row * heads * DIMS + place, acc.to(gl.bfloat16), mask=inside[:, None])
    else:
        at = row * gl.num_programs(0) + part
        gl.store(partial + at * heads * DIMS + place, acc, mask=inside[:, None])
        gl.store(sums + at * 2 * heads + head, top, mask=inside)
        gl.store(sums + (at * 2 + 1) * heads + head, total, mask=inside)


@gluon_jit()
def listed_slots(tile: tl.tensor, lists: tl.tensor, layout: tl.constexpr) -> tl.tensor:
    """Slots i32 [N] of a tile, -1 where there is no row; `lists` as `attend_overlapped` packs them."""
    slots, window_slots, num_rows, num_window, pool_slots, window_pool_slots, window_tiles, last = lists
    is_window = tile < window_tiles
    index = (tile - gl.where(is_window, 0, window_tiles)) * ROWS + gl.arange(0, ROWS, layout)
    count = gl.where(tile < last, gl.where(is_window, num_window, num_rows), 0)
    slot = gl.load(gl.where(is_window, window_slots, slots) + index, mask=index < count, other=-1)
    known = gl.where(is_window, window_pool_slots, pool_slots)
    return gl.where((slot >= 0) & (slot < known), slot, -1).to(gl.int32)


@gluon_jit()
def both_slots(
    tile: tl.tensor, lists: tl.tensor, codes_of: tl.constexpr, rope_of: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """A tile's slots for the threads that read its codes, and for those that read its rope dims."""
    slot = listed_slots(tile, lists, gl.SliceLayout(1, gl.SliceLayout(2, codes_of)))
    return slot, listed_slots(tile, lists, gl.SliceLayout(1, rope_of))


@gluon_jit()
def load_tile(
    slot: tl.tensor,
    rope_slot: tl.tensor,
    is_window: tl.tensor,
    pools: tl.tensor,
    LOG_ENTRIES: tl.constexpr,
    LOG_WINDOW_ENTRIES: tl.constexpr,
    codes_of: tl.constexpr,
    rope_of: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Raw rows: codes i32 [N, 32, 4], four a word, scale exponents i32 [N, 32], rope dims bf16 [N, 64]."""
    pool, window, pool_block_bytes, window_block_bytes = pools
    base = gl.where(is_window, window, pool)
    block_bytes = gl.where(is_window, window_block_bytes, pool_block_bytes)
    log_entries = gl.where(is_window, LOG_WINDOW_ENTRIES, LOG_ENTRIES)
    groups_of: tl.constexpr = gl.SliceLayout(2, codes_of)
    lane = gl.arange(0, LANES, gl.SliceLayout(0, groups_of))
    word = gl.arange(0, LANE_WORDS, gl.SliceLayout(0, gl.SliceLayout(1, codes_of)))

    plane, entry = place_of(slot, block_bytes, log_entries)
    is_code = (slot >= 0)[:, None] & (lane * 16 < NOPE)[None, :]
    value = base + gl.multiple_of(plane + entry * VALUE_BYTES, 16)
    lane_words = value.to(gl.pointer_type(gl.int32), bitcast=True)[:, None] + (lane * LANE_WORDS)[None, :]
    codes = gl.load(lane_words[:, :, None] + word[None, None, :], mask=is_code[:, :, None], other=0)
    scale = plane + (VALUE_BYTES << log_entries) + entry * 8
    exponent = gl.load(base + (scale[:, None] + (lane // 4)[None, :]), mask=is_code, other=0).to(gl.int32)

    plane, entry = place_of(rope_slot, block_bytes, log_entries)
    rope_base = base + gl.multiple_of(plane + entry * VALUE_BYTES + NOPE, 16)
    dim = gl.arange(0, ROPE, gl.SliceLayout(0, rope_of))
    rope_dims = rope_base.to(gl.pointer_type(gl.bfloat16), bitcast=True)[:, None] + dim[None, :]
    return codes, exponent, gl.load(rope_dims, mask=(rope_slot >= 0)[:, None], other=0.0)


@gluon_jit()
def place_of(slot: tl.tensor, block_bytes: tl.tensor, log_entries: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Where a slot's plane begins, i64, and which of its entries it is."""
    block = slot >> log_entries
    return block.to(gl.int64) * block_bytes, slot - (block << log_entries)


@gluon_jit()
def store_tile(codes: tl.tensor, exponent: tl.tensor, rope: tl.tensor, rows: tl.tensor) -> None:
    """Decode raw rows into a bf16 buffer [N, 512]; `row_tile.load_bf16_row_tile` explains the bits."""
    factor = gl.expand_dims((exponent << 7) | (exponent << 23), 2)  # bf16, twice
    low, high = gl.inline_asm_elementwise(
        """{
        .reg .b32 low, high, bits, bias;
        mov.b32 bias, 0x7B807B80;
        prmt.b32 low, $2, 0, 0x1404;
        prmt.b32 high, $2, 0, 0x3424;
        shr.u32 bits, low, 4;
        and.b32 bits, bits, 0x07F007F0;
        lop3.b32 low, low, 0x80008000, bits, 0xEA;
        shr.u32 bits, high, 4;
        and.b32 bits, bits, 0x07F007F0;
        lop3.b32 high, high, 0x80008000, bits, 0xEA;
        mul.rn.bf16x2 low, low, bias;
        mul.rn.bf16x2 high, high, bias;
        mul.rn.bf16x2 $0, low, $3;
        mul.rn.bf16x2 $1, high, $3;
        }""",
        "=r,=r,r,r",
        [codes, factor],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    pairs = gl.reshape(gl.join(low, high), [ROWS, DIMS // 2])  # two dims a word
    words_of: tl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    rows._reinterpret(gl.int32, [ROWS, DIMS // 2], words_of).store(pairs)
    rows.slice(NOPE, ROPE, dim=1).store(rope)
