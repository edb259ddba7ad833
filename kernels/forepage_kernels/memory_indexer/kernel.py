# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton memory_indexer: each program scores one tile of entries in every target layer."""

import triton.language as tl
from torch import Tensor

from forepage_kernels.jit import is_interpreted, jit, on_device_of
from forepage_kernels.key_scores import TILE_ENTRIES, rounded_queries, score_keys, tile_heads
from forepage_kernels.layout import KeyLayout

MAX_TILE_HEADS = 128
NUM_WARPS = 4
"""Both as docs/kernels.md found them fastest."""


def memory_indexer(
    queries: Tensor,
    weights: Tensor,
    keys: Tensor,
    *,
    layout: KeyLayout,
    plane_offsets: Tensor,
    threshold: float,
) -> Tensor:
    """See the package; fp8 or mxfp4 keys. A plane that leaves `keys` counts as absent."""
    batch, layers, heads, dims = queries.shape
    num_entries = plane_offsets.shape[1] * layout.entries
    scores = weights.new_empty(batch, num_entries)
    if scores.numel() == 0:
        return scores
    with on_device_of(queries):
        score_entries[(-(-num_entries // TILE_ENTRIES), batch)](
            rounded_queries(queries),
            weights,
            keys,
            plane_offsets,
            scores,
            layers,
            heads,
            num_entries,
            keys.shape[0] - layout.plane_bytes,
            threshold,
            ENTRIES=layout.entries,
            DIMS=dims,
            VALUE_BYTES=layout.value_bytes,
            SCALE_BYTES=layout.scale_bytes,
            TILE=TILE_ENTRIES,
            BLOCK_H=tile_heads(heads, MAX_TILE_HEADS),
            MXFP4=layout.format == "mxfp4",
            BF16=not is_interpreted(),
            num_warps=NUM_WARPS,
            num_stages=1,
        )
    return scores


@jit
def score_entries(
    queries: tl.tensor,
    weights: tl.tensor,
    keys: tl.tensor,
    plane_offsets: tl.tensor,
    scores: tl.tensor,
    layers: tl.tensor,
    heads: tl.tensor,
    num_entries: tl.tensor,
    last_plane: tl.tensor,
    threshold: tl.tensor,
    ENTRIES: tl.constexpr,
    DIMS: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    MXFP4: tl.constexpr,
    BF16: tl.constexpr,
) -> None:
    """Shapes as in the package; `last_plane` is the largest offset at which a plane still fits."""
    row = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    real = entry < num_entries
    num_blocks = num_entries // ENTRIES
    best = tl.zeros([TILE], tl.float32)
    for layer in range(layers):
        plane = tl.load(
            plane_offsets + (row * num_blocks + entry // ENTRIES) * layers + layer, mask=real, other=-1
        )
        present = (plane >= 0) & (plane <= last_plane)
        logit = score_keys(
            queries + (row * layers + layer) * heads * DIMS,
            weights + (row * layers + layer) * heads,
            heads,
            keys,
            tl.multiple_of(plane + (entry % ENTRIES) * VALUE_BYTES, 8),
            plane + ENTRIES * VALUE_BYTES + (entry % ENTRIES) * SCALE_BYTES,
            present,
            TILE,
            DIMS,
            BLOCK_H,
            BF16,
            MXFP4,
        )
        best = tl.maximum(best, tl.where(present, tl.sigmoid(logit), 0.0))
    tl.store(scores + row * num_entries + entry, tl.where(best > threshold, best, 0.0), mask=real)
