# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton select_topk: a tournament. Groups of 8 are ranked by their largest value, level upon level.

The k groups of largest maximum (ties to the lower group) hold the k largest values with the same rule for
ties: each of them has a value that comes before anything in a group left out. So one program a row selects
k of the few groups at the top, opens those, selects k of their 8 k members, and so on down to the row itself:
the work hardly depends on how values are spread or tied. A selection happens in registers: the k-th value is
found bit by bit, by counting what reaches each candidate, until the count is k; then a prefix sum keeps the
order. Without atomics it is deterministic.
"""

import torch
import triton.language as tl
from torch import Tensor

from forepage_kernels.jit import jit, jit_unspecialised, next_power_of_2, on_device_of

GROUP = 8
TILE_ENTRIES = 4096
"""Entries whose maxima of all levels one program finds: 8 ** 4, so no more than four levels."""
MAX_LEVELS = 4
MIN_TOP = 1024
"""Fewer values than this are not worth a level above them."""
MAX_COMMON_K = 2048
"""Up to this k tiles do not shrink with short rows."""
WARP_ENTRIES, MAX_WARPS = 256, 4
"""Values a warp handles at least, and how many warps at most: every pass ends in a sum over all of them."""
HALF_COUNT = tl.constexpr(1 << 15)
"""Of fewer values two counts fit in 32 bits."""


def select_topk(logits: Tensor, k: int) -> Tensor:
    """See the package."""
    rows, num_entries = logits.shape
    selected = torch.empty(rows, k, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return selected
    block_k = next_power_of_2(min(k, max(num_entries, MAX_COMMON_K)))
    levels, top_size = _levels(num_entries, block_k)
    # Level i has one maximum for each GROUP ** i entries; the levels of a row lie one behind the other.
    row_maxima = sum(-(-num_entries // GROUP**level) for level in range(1, levels + 1))
    maxima = logits.new_empty(rows, row_maxima)
    # Rows grow by a little in every chunk of a prefill: all lengths of as many levels share a binary.
    block_top = max(GROUP * block_k, MIN_TOP)
    if block_k > MAX_COMMON_K:
        block_top = next_power_of_2(top_size)
    widest = max(block_top, GROUP * block_k if levels else 1)
    with on_device_of(logits):
        if levels:
            find_maxima[(-(-num_entries // TILE_ENTRIES), rows)](
                logits, maxima, num_entries, row_maxima, LEVELS=levels, TILE=TILE_ENTRIES, num_warps=4
            )
        select_row[(rows,)](
            logits,
            maxima,
            selected,
            num_entries,
            row_maxima,
            k,
            LEVELS=levels,
            BLOCK_TOP=block_top,
            BLOCK_K=block_k,
            num_warps=max(1, min(MAX_WARPS, widest // WARP_ENTRIES)),
        )
    return selected


def _levels(num_entries: int, block_k: int) -> tuple[int, int]:
    """How many levels of maxima a row gets, and the size of the top one (the row's own without any)."""
    levels, size = 0, num_entries
    while levels < MAX_LEVELS and size > max(GROUP * block_k, MIN_TOP):
        levels, size = levels + 1, -(-num_entries // GROUP ** (levels + 1))
    return levels, size


@jit_unspecialised("num_entries", "row_maxima")
def find_maxima(
    logits: tl.tensor,
    maxima: tl.tensor,
    num_entries: tl.tensor,
    row_maxima: tl.tensor,
    LEVELS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """logits f32 [rows, num_entries] -> maxima f32 [rows, row_maxima]: all levels of one tile."""
    row = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    entry = tile * TILE + tl.arange(0, TILE)
    value = tl.load(logits + row * num_entries + entry, mask=entry < num_entries, other=float("-inf"))
    value = tl.where(value > float("-inf"), value, float("-inf"))  # NaN is never selected
    maxima += row * row_maxima
    count = num_entries
    for level in tl.static_range(1, LEVELS + 1):
        value = tl.max(tl.reshape(value, [TILE // 8**level, 8]), axis=1)
        count = (count + 7) // 8
        group = tile * (TILE // 8**level) + tl.arange(0, TILE // 8**level)
        tl.store(maxima + group, value, mask=group < count)
        maxima += count


@jit_unspecialised("num_entries", "row_maxima", "k")
def select_row(
    logits: tl.tensor,
    maxima: tl.tensor,
    selected: tl.tensor,
    num_entries: tl.tensor,
    row_maxima: tl.tensor,
    k: tl.tensor,
    LEVELS: tl.constexpr,
    BLOCK_TOP: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One row of selected i64 [rows, k]; in between it holds the groups selected so far."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * num_entries
    selected += row * k
    values = logits
    if LEVELS > 0:
        values = maxima + (row + 1) * row_maxima  # behind the top level
    place = tl.arange(0, BLOCK_K)
    for step in tl.static_range(LEVELS + 1):
        count = num_entries
        for _ in tl.static_range(LEVELS - step):
            count = (count + 7) // 8
        values = logits if step == LEVELS else values - count
        if step == 0:
            item = tl.arange(0, BLOCK_TOP)
        else:
            tl.debug_barrier()  # the groups below were stored by other threads
            group = tl.load(selected + place, mask=place < k, other=-1).to(tl.int32)  # [BLOCK_K]
            tl.debug_barrier()
            member = group[:, None] * 8 + tl.arange(0, 8)[None, :]
            item = tl.reshape(tl.where(group[:, None] < 0, count, member), [BLOCK_K * 8])
        value = tl.load(values + item, mask=item < count, other=float("-inf"))
        select_items(value, item, selected, k)


@jit
def select_items(value: tl.tensor, item: tl.tensor, selected: tl.tensor, k: tl.tensor) -> None:
    """Store the items of the k largest values above -inf in their order, then -1 up to k.

    value f32 and item i32 [N], ascending; N need not reach k.
    """
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)  # -0.0 as 0.0
    order = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    order = tl.where(value > float("-inf"), order, 0)
    quota = tl.minimum(k, tl.sum((order > 0).to(tl.int32), 0))
    last = find_last(order, quota)
    above, equal = order > last, order == last
    if value.shape[0] < HALF_COUNT:  # two prefix sums in one
        both = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
        rank, tied = both & 0xFFFF, both >> 16
    else:
        rank, tied = tl.cumsum(above.to(tl.int32), 0), tl.cumsum(equal.to(tl.int32), 0)
    spare = quota - tl.sum(above.to(tl.int32), 0)  # places for what is equal
    take = above | (equal & (tied <= spare))
    tl.store(selected + rank + tl.minimum(tied, spare) - 1, item.to(tl.int64), mask=take)
    for start in range(quota, k, 1024):
        place = start + tl.arange(0, 1024)
        tl.store(selected + place, tl.full([1024], -1, tl.int64), mask=place < k)


@jit
def find_last(order: tl.tensor, quota: tl.tensor) -> tl.tensor:
    """A value that `quota` of order u32 [N] reach, or more of them where that many tie: then the tied value.

    Bit by bit, the highest first; it stops as soon as exactly `quota` reach what is found.
    """
    last = tl.full([], 0, tl.uint32)
    unit = tl.full([], 1 << 31, tl.uint32)
    while unit > 0:
        count = tl.sum((order >= last + unit).to(tl.int32), 0)
        last = tl.where(count >= quota, last + unit, last)
        unit = tl.where(count == quota, 0, unit >> 1)
    return last
