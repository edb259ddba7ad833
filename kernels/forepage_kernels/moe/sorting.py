# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Sorts (token, choice) pairs by expert on the device, and cuts each expert's pairs into tiles.

No atomics and no sort: a pair's place is the number of pairs of smaller experts plus that of earlier pairs
of its own, counted. That reads all pairs once a program, which is little beside the products they lead to.
"""

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from forepage_kernels.jit import jit_unspecialised, next_power_of_2, on_device_of

NO_EXPERT = -1
FIELDS = 3
_PAIRS = 32
"""Pairs, and tiles, that one program places."""
_CHUNK = 512


@dataclass(frozen=True)
class SortedPairs:
    """Pairs p = token * k + choice of a rank's experts, grouped by expert.

    order i32 [P]: pairs in sorted order; behind those of the rank's experts nothing is written.
    tiles i32 [T, 3]: expert (NO_EXPERT: nothing to do), first place in `order`, number of pairs.
    """

    order: Tensor
    tiles: Tensor


def sort_pairs(chosen: Tensor, *, first: int, num_experts: int, tile_tokens: int) -> SortedPairs:
    """chosen i64 [n, k]; experts `first` .. `first + num_experts - 1`, tiles of `tile_tokens` pairs."""
    num_pairs = chosen.numel()
    num_tiles = num_pairs // tile_tokens + min(num_experts, num_pairs)
    order = torch.empty(num_pairs, dtype=torch.int32, device=chosen.device)
    tiles = torch.empty(num_tiles, FIELDS, dtype=torch.int32, device=chosen.device)
    with on_device_of(chosen):
        place_pairs[(-(-max(num_pairs, num_tiles) // _PAIRS),)](
            chosen,
            order,
            tiles,
            num_pairs,
            num_tiles,
            first,
            num_experts,
            TILE_TOKENS=tile_tokens,
            BINS=max(16, next_power_of_2(num_experts + 1)),
            PAIRS=_PAIRS,
            CHUNK=_CHUNK,
            num_warps=8,
        )
    return SortedPairs(order, tiles)


@jit_unspecialised("num_pairs", "num_tiles", "first", "num_experts")
def place_pairs(
    chosen: tl.tensor,
    order: tl.tensor,
    tiles: tl.tensor,
    num_pairs: tl.tensor,
    num_tiles: tl.tensor,
    first: tl.tensor,
    num_experts: tl.tensor,
    TILE_TOKENS: tl.constexpr,
    BINS: tl.constexpr,
    PAIRS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Each program places PAIRS pairs and describes PAIRS tiles. The bin behind the last expert is for the
    pairs of other ranks' experts, which have no place.
    """
    mine = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    expert = tl.load(chosen + mine, mask=mine < num_pairs, other=-1) - first
    is_ours = (expert >= 0) & (expert < num_experts) & (mine < num_pairs)
    counts = tl.zeros([BINS], tl.int32)
    earlier = tl.zeros([PAIRS], tl.int32)
    for start in range(0, num_pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        other = tl.load(chosen + pair, mask=pair < num_pairs, other=-1) - first
        there = (other >= 0) & (other < num_experts) & (pair < num_pairs)
        counts += tl.histogram(tl.where(there, other, num_experts).to(tl.int32), BINS)
        if start < (tl.program_id(0) + 1) * PAIRS:
            same = (other[None, :] == expert[:, None]) & (pair[None, :] < mine[:, None])
            earlier += tl.sum(same.to(tl.int32), axis=1)
    bin_ = tl.arange(0, BINS)
    counts = tl.where(bin_ < num_experts, counts, 0)
    starts = tl.cumsum(counts, axis=0) - counts
    place = tl.sum(tl.where(bin_[None, :] == expert[:, None], starts[None, :], 0), axis=1) + earlier
    tl.store(order + place, mine, mask=is_ours)

    num_each = (counts + TILE_TOKENS - 1) // TILE_TOKENS
    ends = tl.cumsum(num_each, axis=0)
    tile_expert = tl.sum(
        ((ends[None, :] <= mine[:, None]) & (bin_ < num_experts)[None, :]).to(tl.int32), axis=1
    )
    is_tile = bin_[None, :] == tile_expert[:, None]
    nth = mine - tl.sum(tl.where(is_tile, (ends - num_each)[None, :], 0), axis=1)
    begin = tl.sum(tl.where(is_tile, starts[None, :], 0), axis=1) + nth * TILE_TOKENS
    end = tl.sum(tl.where(is_tile, (starts + counts)[None, :], 0), axis=1)
    exists = tile_expert < num_experts
    row = tiles + mine * 3
    tl.store(row, tl.where(exists, tile_expert, -1), mask=mine < num_tiles)
    tl.store(row + 1, tl.where(exists, begin, 0), mask=mine < num_tiles)
    rows = tl.minimum(end - begin, TILE_TOKENS)
    tl.store(row + 2, tl.where(exists, rows, 0), mask=mine < num_tiles)
