# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton native_indexer: each program scores a run of tiles of a sequence's entries.

Of a paged sequence nine tiles in ten are absent: a program looks at its whole run at once, fills what is
absent and walks through the rest. With a program a tile, nearly all would wait for one look and end.
"""

import triton.language as tl
from torch import Tensor

from forepage_kernels.codec import plane_base
from forepage_kernels.jit import is_interpreted, jit_unspecialised, on_device_of
from forepage_kernels.key_scores import TILE_ENTRIES, rounded_queries, score_keys, tile_heads
from forepage_kernels.layout import KeyPool

MAX_TILE_HEADS = 64
NUM_WARPS = 8
"""Both as docs/kernels.md found them fastest."""
PROGRAMS = 792
"""Two waves of three a multiprocessor; so many are launched before runs get longer."""
MAX_RUN = 32


def native_indexer(
    q: Tensor, weights: Tensor, pool: KeyPool, *, block_table: Tensor, visible: Tensor
) -> Tensor:
    """See the package; fp8 or mxfp4 keys. A block id past the pool counts as absent."""
    batch, heads, dims = q.shape
    entries = pool.layout.entries
    num_entries = block_table.shape[1] * entries
    scores = q.new_empty(batch, num_entries)
    if scores.numel() == 0:
        return scores
    tiles = -(-num_entries // TILE_ENTRIES)
    run = max(1, min(MAX_RUN, tiles * batch // PROGRAMS))
    is_whole = TILE_ENTRIES % entries == 0 or entries % TILE_ENTRIES == 0
    with on_device_of(q):
        score_resident[(-(-tiles // run), batch)](
            rounded_queries(q),
            weights,
            pool.bytes,
            block_table,
            visible,
            scores,
            heads,
            num_entries,
            pool.bytes.shape[0],
            pool.block_bytes,
            pool.layer_offset,
            run,
            ENTRIES=entries,
            DIMS=dims,
            VALUE_BYTES=pool.layout.value_bytes,
            SCALE_BYTES=pool.layout.scale_bytes,
            TILE=TILE_ENTRIES,
            STEP=min(TILE_ENTRIES, entries) if is_whole else 1,
            RUN=MAX_RUN,
            BLOCK_H=tile_heads(heads, MAX_TILE_HEADS),
            BF16=not is_interpreted(),
            MXFP4=pool.layout.format == "mxfp4",
            num_warps=NUM_WARPS,
            num_stages=1,
        )
    return scores


@jit_unspecialised("block_table", "visible", "num_entries", "num_blocks", "run")
def score_resident(
    q: tl.tensor,
    weights: tl.tensor,
    pool: tl.tensor,
    block_table: tl.tensor,
    visible: tl.tensor,
    scores: tl.tensor,
    heads: tl.tensor,
    num_entries: tl.tensor,
    num_blocks: tl.tensor,
    block_bytes: tl.tensor,
    layer_offset: tl.tensor,
    run: tl.tensor,
    ENTRIES: tl.constexpr,
    DIMS: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BF16: tl.constexpr,
    MXFP4: tl.constexpr,
) -> None:
    """Shapes as in the package; a program has `run` tiles, at most RUN; blocks begin on multiples of STEP."""
    row = tl.program_id(1).to(tl.int64)
    limit = tl.minimum(tl.load(visible + row), num_entries)
    table_row = block_table + row * (num_entries // ENTRIES)
    scores += row * num_entries
    tile = tl.arange(0, RUN)
    first = tl.program_id(0) * run
    sample = (first + tile)[:, None] * TILE + (tl.arange(0, TILE // STEP) * STEP)[None, :]
    sampled = tl.load(table_row + sample // ENTRIES, mask=(sample < limit) & (tile < run)[:, None], other=-1)
    is_left = tl.max(((sampled >= 0) & (sampled < num_blocks)).to(tl.int32), axis=1) > 0  # [RUN]
    filled = (first + tile)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    is_filled = (filled < num_entries) & (~is_left & (tile < run))[:, None]
    tl.store(scores + filled, tl.full([RUN, TILE], float("-inf"), tl.float32), mask=is_filled)
    for _ in range(tl.sum(is_left.to(tl.int32), 0)):
        at = tl.min(tl.where(is_left, tile, RUN), 0)
        is_left = is_left & (tile != at)
        entry = (first + at).to(tl.int64) * TILE + tl.arange(0, TILE)
        block_id = tl.load(table_row + entry // ENTRIES, mask=entry < limit, other=-1).to(tl.int64)
        present = (block_id >= 0) & (block_id < num_blocks)
        plane = plane_base(block_id * ENTRIES, block_bytes, layer_offset, ENTRIES)
        score = score_keys(
            q + row * heads * DIMS,
            weights + row * heads,
            heads,
            pool,
            tl.multiple_of(plane + (entry % ENTRIES) * VALUE_BYTES, 8),
            plane + ENTRIES * VALUE_BYTES + (entry % ENTRIES) * SCALE_BYTES,
            present,
            TILE,
            DIMS,
            BLOCK_H,
            BF16,
            MXFP4,
        )
        score = tl.where(present, score, float("-inf"))
        tl.store(scores + entry, score, mask=entry < num_entries)
