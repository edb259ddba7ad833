# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton prefill_indexer: a program keeps the queries of a tile of tokens and walks a range of keys.

Entries are rows of the matrix product, (token, head) pairs its columns: the weighted sum over heads is
then within a few lanes, and no score of one head leaves registers.
"""

import triton.language as tl
from torch import Tensor

from forepage_kernels.jit import is_interpreted, jit_unspecialised, next_power_of_2, on_device_of
from forepage_kernels.key_scores import rounded_queries

TILE_ENTRIES = 64
TILE_COLUMNS = 128
"""(token, head) pairs of a program; one token's heads at least."""
PROGRAM_TILES = 32
"""Tiles of entries a program walks: the queries are read once for all of them."""
NUM_WARPS = 4
NUM_STAGES = 3


def prefill_indexer(q: Tensor, weights: Tensor, keys: Tensor, *, start: int, ratio: int) -> Tensor:
    """See the package; bf16 keys."""
    num_tokens, heads, dims = q.shape
    num_entries = keys.shape[0]
    scores = q.new_empty(num_tokens, num_entries)
    if scores.numel() == 0:
        return scores
    block_h = next_power_of_2(heads)
    tile_tokens = max(1, TILE_COLUMNS // block_h)
    grid = (-(-num_entries // (TILE_ENTRIES * PROGRAM_TILES)), -(-num_tokens // tile_tokens))
    with on_device_of(q):
        score_tile[grid](
            rounded_queries(q),
            weights,
            keys.float() if is_interpreted() else keys,
            scores,
            num_tokens,
            num_entries,
            start,
            heads,
            RATIO=ratio,
            DIMS=dims,
            TILE_T=tile_tokens,
            BLOCK_H=max(block_h, 16 // tile_tokens),
            TILE_N=TILE_ENTRIES,
            TILES=PROGRAM_TILES,
            BF16=not is_interpreted(),
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
    return scores


@jit_unspecialised("num_tokens", "num_entries", "start")
def score_tile(
    q: tl.tensor,
    weights: tl.tensor,
    keys: tl.tensor,
    scores: tl.tensor,
    num_tokens: tl.tensor,
    num_entries: tl.tensor,
    start: tl.tensor,
    heads: tl.tensor,
    RATIO: tl.constexpr,
    DIMS: tl.constexpr,
    TILE_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TILE_N: tl.constexpr,
    TILES: tl.constexpr,
    BF16: tl.constexpr,
) -> None:
    """Shapes as in the package; column c of a tile is head c % BLOCK_H of token c // BLOCK_H."""
    dim = tl.arange(0, DIMS)
    first_token = tl.program_id(1) * TILE_T
    column = tl.arange(0, TILE_T * BLOCK_H)
    asker = (first_token + column // BLOCK_H).to(tl.int64)
    head = column % BLOCK_H
    real = (asker < num_tokens) & (head < heads)
    place = asker * heads + head
    query = tl.load(q + place[:, None] * DIMS + dim[None, :], mask=real[:, None], other=0.0)  # [C, D]
    if BF16:
        query = query.to(tl.bfloat16)
    weight = tl.load(weights + place, mask=real, other=0.0)
    token = (first_token + tl.arange(0, TILE_T)).to(tl.int64)
    closed = (start + token + 1) // RATIO  # [TILE_T]
    target = scores + token[None, :] * num_entries
    first = tl.program_id(0) * (TILES * TILE_N)
    end = tl.minimum(first + TILES * TILE_N, num_entries)
    last_token = tl.minimum(first_token + TILE_T, num_tokens)
    any_closed = tl.maximum(tl.minimum(end, (start + last_token) // RATIO), first)
    reached = first + (any_closed - first + TILE_N - 1) // TILE_N * TILE_N
    for entry_0 in range(first, reached, TILE_N):
        entry = (entry_0 + tl.arange(0, TILE_N)).to(tl.int64)
        inside = (entry < num_entries)[:, None]
        key = tl.load(keys + entry[:, None] * DIMS + dim[None, :], mask=inside, other=0.0)  # [N, D]
        dot = tl.dot(key, tl.trans(query), input_precision="ieee")  # [N, C]
        part = tl.maximum(dot, 0.0, propagate_nan=tl.PropagateNan.ALL) * weight[None, :]
        score = tl.sum(tl.reshape(part, [TILE_N, TILE_T, BLOCK_H]), axis=2)  # [N, TILE_T]
        score = tl.where(entry[:, None] < closed[None, :], score, float("-inf"))
        tl.store(target + entry[:, None], score, mask=inside & (token < num_tokens)[None, :])
    for entry_0 in range(reached, end, TILE_N):
        entry = (entry_0 + tl.arange(0, TILE_N)).to(tl.int64)
        inside = (entry < num_entries)[:, None] & (token < num_tokens)[None, :]
        tl.store(target + entry[:, None], tl.full([TILE_N, TILE_T], float("-inf"), tl.float32), mask=inside)
