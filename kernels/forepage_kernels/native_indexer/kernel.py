# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton native_indexer: each program scores one tile of a sequence's entries."""

import triton.language as tl
from torch import Tensor

from forepage_kernels.codec import plane_base
from forepage_kernels.jit import is_interpreted, jit_unspecialised, on_device_of
from forepage_kernels.key_scores import TILE_ENTRIES, rounded_queries, score_keys, tile_heads
from forepage_kernels.layout import KeyPool

MAX_TILE_HEADS = 64
NUM_WARPS = 8
"""Both as docs/kernels.md found them fastest."""


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
    with on_device_of(q):
        score_resident[(-(-num_entries // TILE_ENTRIES), batch)](
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
            ENTRIES=entries,
            DIMS=dims,
            VALUE_BYTES=pool.layout.value_bytes,
            SCALE_BYTES=pool.layout.scale_bytes,
            TILE=TILE_ENTRIES,
            BLOCK_H=tile_heads(heads, MAX_TILE_HEADS),
            BF16=not is_interpreted(),
            MXFP4=pool.layout.format == "mxfp4",
            num_warps=NUM_WARPS,
            num_stages=1,
        )
    return scores


@jit_unspecialised("num_entries", "num_blocks")
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
    ENTRIES: tl.constexpr,
    DIMS: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BF16: tl.constexpr,
    MXFP4: tl.constexpr,
) -> None:
    """Shapes as in the package."""
    row = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    readable = entry < tl.minimum(tl.load(visible + row), num_entries)
    table_row = block_table + row * (num_entries // ENTRIES)
    block_id = tl.load(table_row + entry // ENTRIES, mask=readable, other=-1).to(tl.int64)
    present = (block_id >= 0) & (block_id < num_blocks)
    plane = plane_base(block_id * ENTRIES, block_bytes, layer_offset, ENTRIES)
    heads_scored = heads * tl.max(
        present.to(tl.int32), axis=0
    )  # none where nothing is present: most of a paged row
    score = score_keys(
        q + row * heads * DIMS,
        weights + row * heads,
        heads_scored,
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
    tl.store(scores + row * num_entries + entry, score, mask=entry < num_entries)
