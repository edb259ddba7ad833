# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton tiles that read stored fp8 rows: decoded in registers, exact in bf16."""

import triton.language as tl

from forepage_kernels.codec import load_bf16, load_e4m3, plane_base, power_of_2
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
    SCALE_BYTES: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """fp8 rows of slots i64 [N] -> f32 [N, BLOCK_D]; zeros for slot -1 and beyond DIMS."""
    value_bytes: tl.constexpr = NOPE + 2 * (DIMS - NOPE)
    plane = plane_base(slot, block_bytes, layer_offset, ENTRIES)
    entry = slot % ENTRIES
    value = pool + tl.multiple_of(plane + entry * value_bytes, 8)
    scale = pool + tl.multiple_of(plane + ENTRIES * value_bytes + entry * SCALE_BYTES, 8)
    return decode_row_tile(value, scale, slot >= 0, NOPE, DIMS, BLOCK_D)


@jit
def decode_row_tile(
    value: tl.tensor,
    scale: tl.tensor,
    present: tl.tensor,
    NOPE: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """fp8 rows behind u8 pointers [N] to values and scales -> f32 [N, BLOCK_D]; zeros where not present."""
    groups: tl.constexpr = BLOCK_D // 64
    group = tl.arange(0, groups)
    scaled = present[:, None] & (group * 64 < NOPE)[None, :]
    exponent = tl.load(scale[:, None] + group[None, :], mask=scaled, other=0).to(tl.int32)  # [N, groups]
    grouped_dim = group[:, None] * 64 + tl.arange(0, 64)[None, :]  # [groups, 64]
    nope = load_e4m3(
        value[:, None, None] + grouped_dim[None, :, :],
        present[:, None, None] & (grouped_dim < NOPE)[None, :, :],
    )
    nope = tl.reshape(nope * power_of_2(exponent)[:, :, None], [value.shape[0], BLOCK_D])
    dim = tl.arange(0, BLOCK_D)
    is_rope = (dim >= NOPE) & (dim < DIMS)
    rope = load_bf16((value + NOPE)[:, None], (dim - NOPE)[None, :], present[:, None] & is_rope[None, :])
    return tl.where(is_rope[None, :], rope, nope)


@jit
def load_bf16_row_tile(
    value: tl.tensor,
    scale: tl.tensor,
    present: tl.tensor,
    NOPE: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """As `decode_row_tile`, in bf16, of rows with eight scale bytes; for Hopper, never interpreted.

    The bits of a code s eeee mmm, put where a bf16 has its sign, low exponent and high mantissa, are its
    value times 2^-120 (subnormals too); two exact products make up for that and for the scale. A NaN code
    comes out as 480 times its scale: one is stored only where its group's largest value is NaN, and that
    scale makes it infinite.
    """
    dim = tl.arange(0, BLOCK_D)
    scales = tl.load(scale.to(tl.pointer_type(tl.int64), bitcast=True), mask=present, other=0)
    exponent = (scales[:, None] >> ((dim // 64) * 8)[None, :]) & 0xFF
    factor = (exponent.to(tl.uint16) << 7).to(tl.bfloat16, bitcast=True)
    code = tl.load(value[:, None] + dim[None, :], mask=present[:, None] & (dim < NOPE)[None, :], other=0)
    nope = tl.inline_asm_elementwise(
        """{
        .reg .b32 low, high, bits, sign;
        prmt.b32 low, $2, 0, 0x1404;
        prmt.b32 high, $2, 0, 0x3424;
        shr.u32 bits, low, 4;
        and.b32 bits, bits, 0x07F007F0;
        and.b32 sign, low, 0x80008000;
        or.b32 low, bits, sign;
        shr.u32 bits, high, 4;
        and.b32 bits, bits, 0x07F007F0;
        and.b32 sign, high, 0x80008000;
        or.b32 high, bits, sign;
        mov.b32 bits, 0x7B807B80;
        mul.rn.bf16x2 low, low, bits;
        mul.rn.bf16x2 high, high, bits;
        mul.rn.bf16x2 $0, low, $3;
        mul.rn.bf16x2 $1, high, $4;
        }""",
        "=r,=r,r,r,r",
        [code, factor],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=4,
    )
    is_rope = (dim >= NOPE) & (dim < DIMS)
    rope_base = (value + NOPE).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    rope = tl.load(
        rope_base[:, None] + (dim - NOPE)[None, :], mask=present[:, None] & is_rope[None, :], other=0.0
    )
    return tl.where(is_rope[None, :], rope, nope)
