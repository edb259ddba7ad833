# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton draw_sorted: a program a row walks tiles from the most likely column on; often one is enough.

What is kept is a beginning of the row. The first walk finds its length and sum, the second the column. Tiles
are of one size whatever the batch, so sums are added in one order.
"""

import torch
import triton.language as tl
from torch import Tensor

from forepage_kernels.jit import jit_unspecialised, on_device_of

TILE_COLUMNS = 1024


def draw_sorted(probs: Tensor, *, top_k: Tensor, top_p: Tensor, min_p: Tensor, target: Tensor) -> Tensor:
    """See the package."""
    rows, columns = probs.shape
    picked = target.new_empty(rows, dtype=torch.int64)
    if rows:
        with on_device_of(probs):
            walk[(rows,)](
                probs,
                top_k.contiguous(),
                top_p.contiguous(),
                min_p.contiguous(),
                target.contiguous(),
                picked,
                columns,
                TILE=TILE_COLUMNS,
            )
    return picked


@jit_unspecialised("columns")
def walk(
    probs: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    target: tl.tensor,
    picked: tl.tensor,
    columns: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Shapes as in the package."""
    row = tl.program_id(0).to(tl.int64)
    values = probs + row * columns
    first = tl.load(values)
    least = tl.load(min_p + row) * first
    most = tl.load(top_p + row)
    limit = tl.load(top_k + row)
    kept = tl.full([], 0, tl.int64)
    total = tl.full([], 0.0, tl.float64)
    before = tl.full([], 0.0, tl.float64)
    start = tl.full([], 0, tl.int64)
    going = start < columns
    while going:
        column = start + tl.arange(0, TILE)
        p = tl.load(values + column, mask=column < columns, other=0.0)
        sums = before + tl.cumsum(p, axis=0)
        keep = (column < limit) & (sums - p < most) & (p >= least) & (p > 0.0)
        keep = (keep | (column == 0)) & (column < columns)
        num = tl.sum(keep.to(tl.int64), axis=0)
        total = tl.maximum(total, tl.max(tl.where(keep, sums, 0.0), axis=0))
        kept += num
        before = tl.max(sums, axis=0)
        start += TILE
        going = (num == TILE) & (start < columns)
    goal = tl.load(target + row) * total
    index = tl.full([], 0, tl.int64)
    before = tl.full([], 0.0, tl.float64)
    start = tl.full([], 0, tl.int64)
    going = start < kept
    while going:
        column = start + tl.arange(0, TILE)
        p = tl.load(values + column, mask=column < columns, other=0.0)
        sums = before + tl.cumsum(p, axis=0)
        passed = tl.sum(((sums <= goal) & (column < kept)).to(tl.int64), axis=0)
        index += passed
        before = tl.max(sums, axis=0)
        start += TILE
        going = (passed == TILE) & (start < kept)
    tl.store(picked + row, tl.minimum(index, kept - 1))
