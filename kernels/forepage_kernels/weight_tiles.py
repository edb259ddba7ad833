# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Tiles of quantised weights, decoded in registers to what tensor cores take.

Weights are read in words of 16 bits, that is of 2 fp8 or 4 fp4 columns, and come out as one tile for each
place in a word: columns p, p + 2, .. or p, p + 4, .. A product runs over these tiles in turn, against
activations that `interleaved` lays out the same way, so no value moves between threads. Decoding is exact:
a code has at most 4 significant bits and a scale is a power of two, so bf16 holds every product.
With BF16 off (the interpreter, which lacks bf16 and inline PTX) the same values come as fp32.
"""

import torch
import triton.language as tl
from torch import Tensor

from forepage_kernels.codec import decode_e2m1, decode_e8m0
from forepage_kernels.jit import jit

FP4_PER_WORD = 4
FP8_PER_WORD = 2


def interleaved(x: Tensor, per_word: int) -> Tensor:
    """x [..., K] -> [..., per_word, K / per_word]: columns by their place in a word."""
    return x.view(*x.shape[:-1], -1, per_word).transpose(-1, -2).contiguous()


def words(values: Tensor) -> Tensor:
    """Bytes [..., K] as i16 [..., K / 2]."""
    return values.view(torch.int16)


# Two words in $4, their scales times 2^126 as bf16 in $5; place p of both words to $p. A nibble's sign
# goes to bit 15, its other bits to 8..6: read as bf16 that is the value times 2^-126 (code 1 becomes a
# subnormal, which multiplication takes like any number). 0xea: (a & b) | c.
_DECODE_FP4 = tl.constexpr("""
{
    .reg .b32 t, u;
    prmt.b32 t, $4, 0, 0x2200;
    shl.b32 u, t, 6;
    and.b32 u, u, 0x01c001c0;
    shl.b32 $0, t, 4;
    lop3.b32 $0, $0, 0x80008000, u, 0xea;
    mul.bf16x2 $0, $0, $5;
    shl.b32 u, t, 2;
    and.b32 u, u, 0x01c001c0;
    lop3.b32 $1, t, 0x80008000, u, 0xea;
    mul.bf16x2 $1, $1, $5;
    prmt.b32 t, $4, 0, 0x3311;
    shl.b32 u, t, 6;
    and.b32 u, u, 0x01c001c0;
    shl.b32 $2, t, 4;
    lop3.b32 $2, $2, 0x80008000, u, 0xea;
    mul.bf16x2 $2, $2, $5;
    shl.b32 u, t, 2;
    and.b32 u, u, 0x01c001c0;
    lop3.b32 $3, t, 0x80008000, u, 0xea;
    mul.bf16x2 $3, $3, $5;
}
""")

# Likewise: a byte's sign to bit 15, the rest to 10..4: the value times 2^-120. Two words in $2.
_DECODE_FP8 = tl.constexpr("""
{
    .reg .b32 t, u, bias;
    mov.b32 bias, 0x7b807b80;
    prmt.b32 t, $2, 0, 0x2404;
    shr.b32 u, t, 4;
    and.b32 u, u, 0x07f007f0;
    lop3.b32 $0, t, 0x80008000, u, 0xea;
    mul.bf16x2 $0, $0, bias;
    shr.b32 u, $2, 4;
    and.b32 u, u, 0x07f007f0;
    lop3.b32 $1, $2, 0x80008000, u, 0xea;
    mul.bf16x2 $1, $1, bias;
}
""")


@jit
def decode_fp4(packed: tl.tensor, scales: tl.tensor, BF16: tl.constexpr) -> tuple[tl.tensor, ...]:
    """Words i16 [N, W] and E8M0 codes u8 [N, W / 8] -> columns 4w, 4w + 1, 4w + 2, 4w + 3: [N, W] each."""
    rows: tl.constexpr = packed.shape[0]
    words: tl.constexpr = packed.shape[1]
    scale = _scale_bf16(scales, 126) if BF16 else decode_e8m0(scales.to(tl.int32))
    scale = tl.reshape(tl.broadcast_to(scale[:, :, None], [rows, words // 8, 8]), [rows, words])
    if BF16:
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            _DECODE_FP4,
            "=&r,=&r,=&r,=&r,r,r",
            [packed, scale],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        code = packed.to(tl.int32)
        p0, p1 = decode_e2m1(code & 15) * scale, decode_e2m1((code >> 4) & 15) * scale
        p2, p3 = decode_e2m1((code >> 8) & 15) * scale, decode_e2m1((code >> 12) & 15) * scale
    return p0, p1, p2, p3


@jit
def decode_fp8(packed: tl.tensor, BF16: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Words i16 [N, W] -> columns 2w, 2w + 1 without their scales: [N, W] each. NaN codes read as +-480."""
    if BF16:
        even, odd = tl.inline_asm_elementwise(
            _DECODE_FP8,
            "=&r,=&r,r",
            [packed],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        code = packed.to(tl.int32)
        even = (code & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        odd = ((code >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return even, odd


@jit
def _scale_bf16(scales: tl.tensor, BIAS: tl.constexpr) -> tl.tensor:
    """E8M0 codes u8 -> bf16 factors 2^(code - 127 + BIAS), infinite where bf16 ends."""
    return (tl.minimum(scales.to(tl.int32) + BIAS, 255) << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)
