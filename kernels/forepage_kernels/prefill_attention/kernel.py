# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton prefill_attention: a program attends one token's heads, or several tokens' over rows they share.

Selected rows differ from token to token, so a program with a selection has one token; without one (c128 and
window layers) it has as many as fill a tile of the tensor cores, and reads each row once for all of them.
The walk is fixed, with no split and no atomics.
"""

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from forepage_kernels.jit import is_interpreted, jit, jit_unspecialised, next_power_of_2, on_device_of


@dataclass(frozen=True)
class Tiles:
    """Sizes of a program: `columns` (token, head) pairs at most, `rows` of KV a step."""

    columns: int
    rows: int
    warps: int
    stages: int


MIN_COLUMNS = 16
"""The smallest side of a matrix product on tensor cores."""


def tiles_of(dtype: torch.dtype, dims: int, *, is_selected: bool) -> Tiles:
    """What was fastest on an H100 (docs/kernels.md); fp32 takes what shared memory holds in three parts."""
    if dtype == torch.float32:
        return Tiles(columns=16, rows=16 if dims > 128 else 32, warps=8, stages=1)
    if dims > 256:
        return Tiles(columns=64, rows=64, warps=8, stages=2)
    if is_selected:
        return Tiles(columns=64, rows=64, warps=2, stages=2)
    return Tiles(columns=64, rows=64, warps=4, stages=3)


def prefill_attention(
    q: Tensor,
    rows: Tensor,
    selected: Tensor | None,
    window: Tensor,
    sinks: Tensor,
    *,
    start: int,
    ratio: int,
    window_tokens: int,
    softmax_scale: float,
) -> Tensor:
    """See the package; rows of q's dtype."""
    num_tokens, heads, dims = q.shape
    out = torch.empty_like(q)
    if out.numel() == 0:
        return out
    tiles = tiles_of(q.dtype, dims, is_selected=selected is not None)
    block_h = min(next_power_of_2(heads), tiles.columns)
    tile_tokens = 1 if selected is not None else tiles.columns // block_h
    block_h = max(block_h, MIN_COLUMNS // tile_tokens)
    bf16 = q.dtype == torch.bfloat16 and not is_interpreted()
    with on_device_of(q):
        attend[(-(-heads // block_h), -(-num_tokens // tile_tokens))](
            q,
            rows,
            rows if selected is None else selected,
            window,
            sinks,
            out,
            softmax_scale,
            heads,
            num_tokens,
            start,
            rows.shape[0],
            0 if selected is None else selected.shape[1],
            window.shape[0] - num_tokens,
            RATIO=ratio,
            WINDOW=window_tokens,
            DIMS=dims,
            BLOCK_D=max(MIN_COLUMNS, next_power_of_2(dims)),
            BLOCK_H=block_h,
            TILE_T=tile_tokens,
            BLOCK_N=tiles.rows,
            SELECTED=selected is not None,
            BF16=bf16,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    return out


@jit_unspecialised("num_tokens", "start", "num_rows", "num_selected", "before")
def attend(
    q: tl.tensor,
    rows: tl.tensor,
    selected: tl.tensor,
    window: tl.tensor,
    sinks: tl.tensor,
    out: tl.tensor,
    softmax_scale: tl.tensor,
    heads: tl.tensor,
    num_tokens: tl.tensor,
    start: tl.tensor,
    num_rows: tl.tensor,
    num_selected: tl.tensor,
    before: tl.tensor,
    RATIO: tl.constexpr,
    WINDOW: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TILE_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SELECTED: tl.constexpr,
    BF16: tl.constexpr,
) -> None:
    """Shapes as in the package; pair m of a tile is head m % BLOCK_H of token m // BLOCK_H."""
    first = tl.program_id(1).to(tl.int64) * TILE_T
    last = tl.minimum(first + TILE_T, num_tokens) - 1
    pair = tl.arange(0, TILE_T * BLOCK_H)
    token = first + pair // BLOCK_H
    head = tl.program_id(0) * BLOCK_H + pair % BLOCK_H
    dim = tl.arange(0, BLOCK_D)[None, :]
    place = (token * heads + head)[:, None] * DIMS + dim
    inside = ((token <= last) & (head < heads))[:, None] & (dim < DIMS)
    query = tl.load(q + place, mask=inside, other=0.0)
    if not BF16:
        query = query.to(tl.float32)
    top = tl.full([TILE_T * BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([TILE_T * BLOCK_H], tl.float32)
    acc = tl.zeros([TILE_T * BLOCK_H, BLOCK_D], tl.float32)
    offset = tl.arange(0, BLOCK_N)
    closed = tl.minimum((start + token + 1) // RATIO, num_rows)
    all_closed = tl.minimum((start + last + 1) // RATIO, num_rows)
    if SELECTED:
        for begin in range(0, tl.minimum(num_selected, all_closed), BLOCK_N):
            listed = begin + offset < num_selected
            entry = tl.load(selected + first * num_selected + begin + offset, mask=listed, other=-1)
            present = (entry >= 0) & (entry < all_closed)
            tile = load_tile(rows, entry, present, DIMS, BLOCK_D, BF16)
            top, total, acc = attend_tile(query, tile, present[None, :], softmax_scale, top, total, acc, BF16)
    else:
        for begin in range(0, all_closed, BLOCK_N):
            entry = begin + offset
            tile = load_tile(rows, entry, entry < all_closed, DIMS, BLOCK_D, BF16)
            allowed = entry[None, :] < closed[:, None]
            top, total, acc = attend_tile(query, tile, allowed, softmax_scale, top, total, acc, BF16)
    oldest = tl.maximum(before + first - (WINDOW - 1), 0)
    for begin in range(oldest, before + last + 1, BLOCK_N):
        row = begin + offset
        tile = load_tile(window, row, row <= before + last, DIMS, BLOCK_D, BF16)
        age = (before + token)[:, None] - row[None, :]
        allowed = (age >= 0) & (age < WINDOW)
        top, total, acc = attend_tile(query, tile, allowed, softmax_scale, top, total, acc, BF16)
    sink = tl.load(sinks + head, mask=head < heads, other=0.0)
    attended = top > float("-inf")
    total += tl.exp(tl.where(attended, sink - top, 0.0))
    result = tl.where(attended[:, None], acc / total[:, None], 0.0)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


@jit
def load_tile(
    rows: tl.tensor,
    row: tl.tensor,
    present: tl.tensor,
    DIMS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BF16: tl.constexpr,
) -> tl.tensor:
    """Rows i64 [N] -> [N, BLOCK_D]; zeros where not present and beyond DIMS."""
    dim = tl.arange(0, BLOCK_D)[None, :]
    mask = present[:, None]
    if DIMS < BLOCK_D:
        mask = mask & (dim < DIMS)
    tile = tl.load(rows + row.to(tl.int64)[:, None] * DIMS + dim, mask=mask, other=0.0)
    return tile if BF16 else tile.to(tl.float32)


@jit
def attend_tile(
    query: tl.tensor,
    rows: tl.tensor,
    allowed: tl.tensor,
    softmax_scale: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    BF16: tl.constexpr,
) -> tl.tensor:
    """One step of the online softmax: query [M, D], rows [N, D], allowed bool [M or 1, N]."""
    scores = tl.dot(query, tl.trans(rows), input_precision="tf32x3") * softmax_scale  # [M, N]
    scores = tl.where(allowed, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(new_top > float("-inf"), new_top, 0.0)
    keep = tl.exp(top - base)
    p = tl.exp(scores - base[:, None])
    total = total * keep + tl.sum(p, axis=1)
    if BF16:
        p = p.to(tl.bfloat16)
    acc = tl.dot(p, rows, acc * keep[:, None], input_precision="tf32x3")
    return new_top, total, acc
