# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton memory_indexer: programs score tiles of entries in every target layer.

fp8 keys stream past: a program takes a run of tiles, layer by layer, so that a layer's queries stay in shared
memory, and codes are decoded in registers as the product's left operand. Other keys, and more heads than a
program holds, are scored tile by tile. How many tiles a run has changes no bit.
"""

from dataclasses import dataclass

import triton.language as tl
from torch import Tensor

from forepage_kernels.codec import load_f32
from forepage_kernels.jit import is_interpreted, jit, jit_unspecialised, on_device_of
from forepage_kernels.key_scores import TILE_ENTRIES, rounded_queries, score_keys, tile_heads
from forepage_kernels.layout import KeyLayout
from forepage_kernels.weight_tiles import decode_fp8

MAX_TILE_HEADS = 128
NUM_WARPS = 4
"""Both as docs/kernels.md found them fastest."""


@dataclass(frozen=True)
class Stream:
    """How fp8 keys are scored: by about so many programs, so many entries at a time.

    registers: of a thread, at most; 0: as many as it takes.
    """

    entries: int = 64
    warps: int = 4
    stages: int = 1
    programs: int = 792
    registers: int = 0


STREAM = Stream()
"""Two waves of three programs an SM of an H100, or of an H200."""


def memory_indexer(
    queries: Tensor,
    weights: Tensor,
    keys: Tensor,
    *,
    layout: KeyLayout,
    plane_offsets: Tensor,
    threshold: float,
    stream: Stream | None = STREAM,
) -> Tensor:
    """See the package; fp8 or mxfp4 keys. A plane that leaves `keys` counts as absent.

    `stream`: None scores fp8 keys like others, tile by tile.
    """
    batch, layers, heads, dims = queries.shape
    num_entries = plane_offsets.shape[1] * layout.entries
    scores = weights.new_empty(batch, num_entries)
    if scores.numel() == 0:
        return scores
    arguments = (
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
    )
    block_h = tile_heads(heads, MAX_TILE_HEADS)
    with on_device_of(queries):
        if stream is None or layout.format != "fp8" or heads > block_h or layers == 0:
            score_entries[(-(-num_entries // TILE_ENTRIES), batch)](
                *arguments,
                ENTRIES=layout.entries,
                DIMS=dims,
                VALUE_BYTES=layout.value_bytes,
                SCALE_BYTES=layout.scale_bytes,
                TILE=TILE_ENTRIES,
                BLOCK_H=block_h,
                MXFP4=layout.format == "mxfp4",
                BF16=not is_interpreted(),
                num_warps=NUM_WARPS,
                num_stages=1,
            )
            return scores
        tiles = -(-num_entries // stream.entries)
        run = max(1, tiles * batch // stream.programs)
        limit = {"maxnreg": stream.registers} if stream.registers else {}
        stream_entries[(-(-tiles // run), batch)](
            *arguments,
            run,
            ENTRIES=layout.entries,
            DIMS=dims,
            VALUE_BYTES=layout.value_bytes,
            SCALE_BYTES=layout.scale_bytes,
            TILE=stream.entries,
            BLOCK_H=block_h,
            STAGES=stream.stages,
            BF16=not is_interpreted(),
            num_warps=stream.warps,
            num_stages=stream.stages,
            **limit,
        )
    return scores


@jit_unspecialised("run")
def stream_entries(
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
    run: tl.tensor,
    ENTRIES: tl.constexpr,
    DIMS: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
    BF16: tl.constexpr,
) -> None:
    """As `score_entries`, of fp8 keys and at most BLOCK_H heads; a program scores `run` tiles.

    Between layers an entry's best waits in `scores`.
    """
    row = tl.program_id(1).to(tl.int64)
    num_blocks = num_entries // ENTRIES
    begin = tl.program_id(0) * run * TILE
    end = tl.minimum(begin + run * TILE, num_entries)
    head = tl.arange(0, BLOCK_H)
    dim = tl.arange(0, DIMS)
    word = tl.arange(0, DIMS // 2)
    is_head = head < heads
    for layer in range(layers):
        source = row * layers + layer
        place = (source * heads + head)[:, None] * DIMS + dim[None, :]
        query = tl.load(queries + place, mask=is_head[:, None], other=0.0)  # [BLOCK_H, DIMS]
        query = query.to(tl.bfloat16) if BF16 else query.to(tl.float32)
        even, odd = tl.split(tl.reshape(query, [BLOCK_H, DIMS // 2, 2]))
        weight = tl.load(weights + source * heads + head, mask=is_head, other=0.0)
        tl.debug_barrier()  # the last layer's scores were stored by other threads than those that load them
        for first in tl.range(begin, end, TILE, num_stages=STAGES):
            entry = first + tl.arange(0, TILE)
            real = entry < num_entries
            if ENTRIES % TILE == 0:  # one block a tile: its place is a scalar
                plane = tl.load(plane_offsets + (row * num_blocks + first // ENTRIES) * layers + layer)
                inside = first % ENTRIES + tl.arange(0, TILE)
                present = real & ((plane >= 0) & (plane <= last_plane))
            else:
                block = row * num_blocks + entry // ENTRIES
                plane = tl.load(plane_offsets + block * layers + layer, mask=real, other=-1)
                inside = entry % ENTRIES
                present = (plane >= 0) & (plane <= last_plane)
            value = keys + tl.multiple_of(tl.multiple_of(plane, 8) + inside * VALUE_BYTES, 8)
            words = value.to(tl.pointer_type(tl.int16), bitcast=True)
            packed = tl.load(
                words[:, None] + word[None, :], mask=present[:, None], other=0
            )  # [TILE, DIMS / 2]
            scale = load_f32(keys + plane + ENTRIES * VALUE_BYTES + inside * SCALE_BYTES, present)
            key_even, key_odd = decode_fp8(packed, BF16)
            dot = tl.dot(key_even, tl.trans(even), input_precision="ieee")  # [TILE, BLOCK_H]
            dot = tl.dot(key_odd, tl.trans(odd), dot, input_precision="ieee")
            logit = tl.sum(tl.maximum(dot, 0.0) * weight[None, :], axis=1) * scale
            best = tl.where(present, tl.sigmoid(logit), 0.0)
            kept = scores + row * num_entries + entry
            if layer > 0:
                best = tl.maximum(best, tl.load(kept, mask=real, other=0.0))
            if layer == layers - 1:
                best = tl.where(best > threshold, best, 0.0)
            tl.store(kept, best, mask=real)


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
