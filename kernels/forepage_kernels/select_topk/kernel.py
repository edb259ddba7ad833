# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton select_topk: one program a row finds the k-th largest value by radix, then compacts.

Four passes of one 8-bit digit each narrow down the k-th value; a fifth writes, in index order, every
index above it and the first few equal to it. Ascending output and the tie rule come for free, and no
atomics are used, so the result is deterministic.
"""

import torch
import triton.language as tl
from torch import Tensor

from forepage_kernels.jit import jit, on_device_of

TILE_ENTRIES = 4096


def select_topk(logits: Tensor, k: int) -> Tensor:
    """See the package."""
    rows, num_entries = logits.shape
    selected = torch.empty(rows, k, dtype=torch.int64, device=logits.device)
    if rows:
        with on_device_of(logits):
            select_row[(rows,)](logits, selected, num_entries, k, TILE=TILE_ENTRIES, num_warps=8)
    return selected


@jit
def select_row(
    logits: tl.tensor, selected: tl.tensor, num_entries: tl.tensor, k: tl.tensor, TILE: tl.constexpr
) -> None:
    """logits f32 [rows, num_entries] -> selected i64 [rows, k]."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * num_entries
    selected += row * k
    quota = tl.full([], k, tl.int32)  # how many of the values that share the digits found so far are wanted
    digits = tl.full([], 0, tl.uint32)
    bins = tl.arange(0, 256)
    for step in tl.static_range(4):
        counts = count_digit(logits, num_entries, digits, 24 - 8 * step, TILE)
        at_least = tl.cumsum(counts, 0, reverse=True)  # values whose digit is >= the bin
        if step == 0:
            quota = tl.minimum(quota, tl.sum(counts, 0))
        digit = tl.sum((at_least >= quota).to(tl.int32), 0) - 1
        quota -= tl.sum(tl.where(bins == digit, at_least - counts, 0), 0)
        digits = (digits << 8) | digit.to(tl.uint32)
    written = tl.full([], 0, tl.int32)
    for start in range(0, num_entries, TILE):
        entry = start + tl.arange(0, TILE)
        order, valid = load_ordered(logits, entry, num_entries)
        equal = (valid & (order == digits)).to(tl.int32)
        within = tl.cumsum(equal, 0) <= quota
        take = (valid & (order > digits)) | ((equal > 0) & within)
        place = written + tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(selected + place, entry.to(tl.int64), mask=take)
        quota -= tl.minimum(quota, tl.sum(equal, 0))
        written += tl.sum(take.to(tl.int32), 0)
    for start in range(0, k, TILE):
        place = start + tl.arange(0, TILE)
        absent = tl.full([TILE], -1, tl.int64)
        tl.store(selected + place, absent, mask=(place >= written) & (place < k))


@jit
def count_digit(
    logits: tl.tensor, num_entries: tl.tensor, digits: tl.tensor, SHIFT: tl.constexpr, TILE: tl.constexpr
) -> tl.tensor:
    """Histogram i32 [256] of the 8 bits at SHIFT, of the values whose higher bits are `digits`."""
    counts = tl.zeros([256], tl.int32)
    for start in range(0, num_entries, TILE):
        order, valid = load_ordered(logits, start + tl.arange(0, TILE), num_entries)
        if SHIFT < 24:
            valid = valid & ((order >> (SHIFT + 8)) == digits)
        counts += tl.histogram(((order >> SHIFT) & 0xFF).to(tl.int32), 256, mask=valid)
    return counts


@jit
def load_ordered(logits: tl.tensor, entry: tl.tensor, num_entries: tl.tensor) -> tl.tensor:
    """Values as u32 in the same order as the floats (-0.0 as 0.0), and which are above -inf."""
    value = tl.load(logits + entry, mask=entry < num_entries, other=float("-inf"))
    valid = value > float("-inf")
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) | -2147483648)
    return order.to(tl.uint32, bitcast=True), valid
