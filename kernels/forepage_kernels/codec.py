# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton's side of `layout`: the same bytes, addresses and roundings inside kernels.

Encoding works on the bits of fp32 (round to nearest even), not on Triton's float8 casts: it is then
exact wherever it runs, the interpreter included, and agrees with torch bit for bit.
Every span begins on a multiple of 8 bytes (layout checks that), which the address helpers promise
the compiler so that it may load 8 bytes at a time.
"""

import triton.language as tl

from forepage_kernels.jit import jit


@jit
def plane_base(
    slot: tl.tensor, block_bytes: tl.tensor, layer_offset: tl.tensor, ENTRIES: tl.constexpr
) -> tl.tensor:
    """Byte offset of the plane a slot i64 lies in."""
    return tl.multiple_of((slot // ENTRIES) * block_bytes + layer_offset, 8)


@jit
def scale_exponent(amax: tl.tensor) -> tl.tensor:
    """Biased exponent i32 of 2^ceil(log2(max(amax, 1e-4) / 448)), off amax's bits: see layout._quantize."""
    bits = tl.maximum(amax, 1e-4).to(tl.int32, bitcast=True)
    return (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)


@jit
def power_of_2(exponent: tl.tensor) -> tl.tensor:
    """Biased exponent i32 -> f32."""
    return (exponent << 23).to(tl.float32, bitcast=True)


@jit
def encode_e4m3(x: tl.tensor) -> tl.tensor:
    """f32, |x| <= 448 or NaN -> e4m3 code u8, rounded to nearest even.

    Normal codes keep the top 3 mantissa bits; below 2^-6 adding 2^14 makes the adder itself round to
    the subnormal step 2^-9.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    absolute = magnitude.to(tl.float32, bitcast=True)
    subnormal = (absolute + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(absolute < 0.015625, subnormal, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (((bits >> 24) & 0x80) | code).to(tl.uint8)


@jit
def encode_bf16(x: tl.tensor) -> tl.tensor:
    """f32 -> bf16 code u16, rounded to nearest even."""
    bits = x.to(tl.int32, bitcast=True)
    code = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, code).to(tl.uint16)


@jit
def mx_exponent(amax_bits: tl.tensor) -> tl.tensor:
    """fp32 bits of a group's amax i32 -> biased exponent of its MXFP4 scale, 255 if not finite: see mxfp4."""
    bits = tl.maximum(amax_bits, 0x01C00000)
    exponent = (bits >> 23) - 2 + ((bits & 0x7FFFFF) > 0x400000).to(tl.int32)
    return tl.where(bits >= 0x7F800000, 255, exponent)


@jit
def encode_e2m1(x: tl.tensor) -> tl.tensor:
    """f32, |x| <= 6 -> e2m1 code i32: how many of the seven midpoints lie below; ties go to even codes."""
    a = tl.abs(x)
    below = (
        (a > 0.25).to(tl.int32) + (a > 1.25).to(tl.int32) + (a > 2.5).to(tl.int32) + (a > 5.0).to(tl.int32)
    )
    reached = (a >= 0.75).to(tl.int32) + (a >= 1.75).to(tl.int32) + (a >= 3.5).to(tl.int32)
    return (below + reached) | ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@jit
def decode_e2m1(code: tl.tensor) -> tl.tensor:
    """e2m1 code i32 -> f32: from code 2 on the bits of an fp32 with one mantissa bit, below code / 2."""
    magnitude = code & 7
    normal = ((magnitude + 252) << 22).to(tl.float32, bitcast=True)
    absolute = tl.where(magnitude < 2, magnitude.to(tl.float32) * 0.5, normal)
    return tl.where(code > 7, -absolute, absolute)


@jit
def decode_e8m0(code: tl.tensor) -> tl.tensor:
    """UE8M0 code i32 -> f32: 2^-127 for 0, NaN for 255."""
    bits = tl.where(code == 0, 0x00400000, tl.where(code == 255, 0x7FC00000, code << 23))
    return bits.to(tl.float32, bitcast=True)


@jit
def load_mxfp4(
    values: tl.tensor, scales: tl.tensor, mask: tl.tensor, N: tl.constexpr, DIMS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """N keys at u8 pointers [N] to their values and scales -> f32 [N, DIMS], and [N] NaN where a scale is.

    Zeros (and 1) where masked. The second exists because a ReLU hides a NaN: multiply with it afterwards.
    """
    pair = tl.arange(0, DIMS // 2)[None, :]
    byte = tl.load(values[:, None] + pair, mask=mask[:, None], other=0).to(tl.int32)  # [N, DIMS / 2]
    code = tl.join(byte & 15, byte >> 4)  # [N, DIMS / 2, 2]
    group = tl.arange(0, DIMS // 32)[None, :]
    exponent = tl.load(scales[:, None] + group, mask=mask[:, None], other=0).to(tl.int32)  # [N, DIMS / 32]
    value = tl.reshape(decode_e2m1(code), [N, DIMS // 32, 32]) * decode_e8m0(exponent)[:, :, None]
    sound = tl.where(tl.max(exponent, axis=1) == 255, float("nan"), 1.0)
    return tl.reshape(value, [N, DIMS]), sound


@jit
def load_e4m3(ptr: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """e4m3 codes at u8 pointers -> f32; zeros where masked."""
    return tl.load(ptr, mask=mask, other=0).to(tl.float8e4nv, bitcast=True).to(tl.float32)


@jit
def load_bf16(base: tl.tensor, index: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """The index-th bf16 behind u8 pointers -> f32; zeros where masked."""
    code = tl.load(base.to(tl.pointer_type(tl.uint16), bitcast=True) + index, mask=mask, other=0)
    return (code.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@jit
def load_f32(ptr: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """fp32 at u8 pointers to their first byte; zeros where masked."""
    return tl.load(ptr.to(tl.pointer_type(tl.float32), bitcast=True), mask=mask, other=0.0)
