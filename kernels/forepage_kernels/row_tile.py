# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton tiles of KV rows: reading stored fp8 rows, and one step of attention over rows that were read."""

import triton.language as tl

from forepage_kernels.codec import plane_base
from forepage_kernels.jit import jit


@jit
def load_row_tile(
    pool: tl.tensor,
    slot: tl.tensor,
    block_bytes: tl.tensor,
    layer_offset: tl.tensor,
    ENTRIES: tl.constexpr,
    NOPE: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BF16: tl.constexpr,
) -> tl.tensor:
    """fp8 rows of slots i64 [N] -> [N, BLOCK_D], f32 or (exact too) bf16; zeros for slot -1 and beyond DIMS.

    Every load is 8 bytes or wider, so that the compiler can fetch a tile ahead of its use.
    """
    value_bytes: tl.constexpr = NOPE + 2 * (DIMS - NOPE)
    groups: tl.constexpr = BLOCK_D // 64
    present = slot >= 0
    plane = plane_base(slot, block_bytes, layer_offset, ENTRIES)
    entry = slot % ENTRIES
    value = pool + tl.multiple_of(plane + entry * value_bytes, 8)
    scales = pool + tl.multiple_of(plane + ENTRIES * value_bytes + entry * 8, 8)
    word = tl.load(scales.to(tl.pointer_type(tl.int64), bitcast=True), mask=present, other=0)  # [N]
    group = tl.arange(0, groups)
    exponent = (word[:, None] >> (group * 8)[None, :]) & 0xFF  # [N, groups]
    dim = group[:, None] * 64 + tl.arange(0, 64)[None, :]  # [groups, 64]
    mask = present[:, None, None] & (dim < NOPE)[None, :, :]
    code = tl.load(value[:, None, None] + dim[None, :, :], mask=mask, other=0).to(tl.float8e4nv, bitcast=True)
    if BF16:
        scale = (exponent << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)
        tile = code.to(tl.bfloat16) * scale[:, :, None]
    else:
        scale = (exponent << 23).to(tl.int32).to(tl.float32, bitcast=True)
        tile = code.to(tl.float32) * scale[:, :, None]
    rope = (value + NOPE).to(tl.pointer_type(tl.uint16), bitcast=True)[:, None, None]
    if NOPE % 64 == 0 and DIMS - NOPE <= 64:  # one group, read once for all groups
        lane = tl.arange(0, 64)[None, None, :]
        mask = present[:, None, None] & (lane < DIMS - NOPE)
        tile = tl.where((dim >= NOPE)[None, :, :], load_rope(rope + lane, mask, BF16), tile)
    else:
        is_rope = (dim >= NOPE) & (dim < DIMS)
        mask = present[:, None, None] & is_rope[None, :, :]
        tile = tl.where(is_rope[None, :, :], load_rope(rope + (dim - NOPE)[None, :, :], mask, BF16), tile)
    return tl.reshape(tile, [slot.shape[0], BLOCK_D])


@jit
def load_rope(ptr: tl.tensor, mask: tl.tensor, BF16: tl.constexpr) -> tl.tensor:
    """bf16 codes at u16 pointers -> bf16 or f32; zeros where masked."""
    code = tl.load(ptr, mask=mask, other=0)
    if BF16:
        number = code.to(tl.bfloat16, bitcast=True)
    else:
        number = (code.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return number


@jit
def attend_tile(
    query: tl.tensor,
    rows: tl.tensor,
    allowed: tl.tensor,
    unlinked: tl.tensor,
    softmax_scale: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    BF16: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One step of the online softmax: query [M, D], rows [N, D], allowed bool [M or 1, N]; it may be empty.

    `unlinked` is always true: where one product feeds another, the compiler gives all warps to the rows of
    the first, and with 64 of them both warp groups would compute the same. It does not look through the end
    of a conditional.
    """
    if BF16:
        scores = tl.zeros([query.shape[0], rows.shape[0]], tl.float32)
        if unlinked:
            scores = tl.dot(query, tl.trans(rows))  # [M, N]
    else:
        scores = tl.dot(query, tl.trans(rows), input_precision="tf32x3")
    scores = tl.where(allowed, scores * softmax_scale, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(new_top > float("-inf"), new_top, 0.0)
    keep = tl.exp(top - base)
    p = tl.exp(scores - base[:, None])
    total = total * keep + tl.sum(p, axis=1)
    if BF16:
        p = p.to(tl.bfloat16)
    acc = tl.dot(p, rows, acc * keep[:, None], input_precision="tf32x3")
    return new_top, total, acc
