# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton compress_quantize: one program an entry, in fp32 registers from pooling to the stored bytes."""

import triton.language as tl
from torch import Tensor

from forepage_kernels.codec import (
    encode_bf16,
    encode_e2m1,
    encode_e4m3,
    mx_exponent,
    plane_base,
    power_of_2,
    scale_exponent,
)
from forepage_kernels.jit import jit, jit_unspecialised, next_power_of_2, on_device_of
from forepage_kernels.layout import SCALE_GROUP, KeyLayout, KeyPool, RowLayout, RowPool

MAX_TILE_TOKENS = 8


def compress_quantize(
    kv: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    pool: RowPool | KeyPool,
    slots: Tensor,
    *,
    rope_dims: int,
    eps: float,
) -> None:
    """See the package; quantised pools. A slot past the pool stores nothing."""
    num_entries, tokens, dims = kv.shape
    layout = pool.layout
    if num_entries == 0:
        return
    with on_device_of(kv):
        close_entry[(num_entries,)](
            kv,
            gate,
            norm_weight,
            cos,
            sin,
            pool.bytes,
            slots,
            tokens,
            pool.num_slots,
            pool.block_bytes,
            pool.layer_offset,
            eps,
            dims**-0.5,
            ENTRIES=layout.entries,
            DIMS=dims,
            ROPE=rope_dims,
            NOPE=layout.nope_dims if isinstance(layout, RowLayout) else dims,
            SCALE_BYTES=layout.scale_bytes,
            IS_KEY=isinstance(layout, KeyLayout),
            MXFP4=layout.format == "mxfp4",
            TILE_W=min(MAX_TILE_TOKENS, next_power_of_2(tokens)),
            BLOCK_D=max(SCALE_GROUP, next_power_of_2(dims)),
        )


@jit_unspecialised("num_slots")
def close_entry(
    kv: tl.tensor,
    gate: tl.tensor,
    norm_weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    pool: tl.tensor,
    slots: tl.tensor,
    tokens: tl.tensor,
    num_slots: tl.tensor,
    block_bytes: tl.tensor,
    layer_offset: tl.tensor,
    eps: tl.tensor,
    hadamard_scale: tl.tensor,
    ENTRIES: tl.constexpr,
    DIMS: tl.constexpr,
    ROPE: tl.constexpr,
    NOPE: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    IS_KEY: tl.constexpr,
    MXFP4: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Shapes as in the package; ROPE dims are turned, DIMS - NOPE dims are stored in bf16."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if (slot >= 0) & (slot < num_slots):
        dim = tl.arange(0, BLOCK_D)
        pooled = pool_tokens(
            kv + row * tokens * DIMS, gate + row * tokens * DIMS, tokens, DIMS, TILE_W, BLOCK_D
        )
        mean = tl.sum(tl.where(dim < DIMS, pooled * pooled, 0.0), axis=0) / DIMS
        weight = tl.load(norm_weight + dim, mask=dim < DIMS, other=0.0)
        entry = pooled * tl.rsqrt(mean + eps) * weight
        entry = turn(entry, cos + row * (ROPE // 2), sin + row * (ROPE // 2), DIMS, ROPE, BLOCK_D)
        plane = pool + plane_base(slot, block_bytes, layer_offset, ENTRIES)
        if IS_KEY:
            entry = hadamard(entry, DIMS) * hadamard_scale
            if MXFP4:
                store_mxfp4_key(entry, plane, slot % ENTRIES, ENTRIES, DIMS)
            else:
                store_key(entry, plane, slot % ENTRIES, ENTRIES, DIMS)
        else:
            store_row(entry, plane, slot % ENTRIES, ENTRIES, NOPE, DIMS, SCALE_BYTES, BLOCK_D)


@jit
def pool_tokens(
    kv: tl.tensor,
    gate: tl.tensor,
    tokens: tl.tensor,
    DIMS: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Per-channel softmax of gate [tokens, DIMS] over the tokens, applied to kv -> f32 [BLOCK_D]."""
    dim = tl.arange(0, BLOCK_D)[None, :]
    top = tl.full([BLOCK_D], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, tokens, TILE_W):
        token = start + tl.arange(0, TILE_W)[:, None]
        inside = (token < tokens) & (dim < DIMS)
        g = tl.load(gate + token * DIMS + dim, mask=inside, other=float("-inf"))
        g = tl.where(dim < DIMS, g, 0.0)
        value = tl.load(kv + token * DIMS + dim, mask=inside & (g > float("-inf")), other=0.0)
        new_top = tl.maximum(top, tl.max(g, axis=0))
        base = tl.where(new_top > float("-inf"), new_top, 0.0)
        keep = tl.exp(top - base)
        p = tl.exp(g - base[None, :])
        total = total * keep + tl.sum(p, axis=0)
        acc = acc * keep + tl.sum(p * value, axis=0)
        top = new_top
    return acc / total


@jit
def turn(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    DIMS: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """RoPE on the interleaved pairs of the trailing ROPE of DIMS dims; cos, sin point at [ROPE / 2]."""
    pair = tl.arange(0, BLOCK_D // 2) - (DIMS - ROPE) // 2
    turned = (pair >= 0) & (pair < ROPE // 2)
    c = tl.load(cos + pair, mask=turned, other=1.0)
    s = tl.load(sin + pair, mask=turned, other=0.0)
    even, odd = tl.split(tl.reshape(x, [BLOCK_D // 2, 2]))
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [BLOCK_D])


@jit
def hadamard(x: tl.tensor, DIMS: tl.constexpr) -> tl.tensor:
    """Unscaled Sylvester-Hadamard butterfly of x [DIMS], the additions in layout.hadamard's order."""
    for step in tl.static_range(16):
        if 2**step < DIMS:
            x = butterfly(x, DIMS, 2**step)
    return x


@jit
def butterfly(x: tl.tensor, DIMS: tl.constexpr, STRIDE: tl.constexpr) -> tl.tensor:
    """(a, b) -> (a + b, a - b) for all pairs of dims that lie STRIDE apart."""
    pairs = tl.permute(tl.reshape(x, [DIMS // (2 * STRIDE), 2, STRIDE]), [0, 2, 1])
    low, high = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(low + high, low - high), [0, 2, 1]), [DIMS])


@jit
def store_key(
    x: tl.tensor, plane: tl.tensor, place: tl.tensor, ENTRIES: tl.constexpr, DIMS: tl.constexpr
) -> None:
    """Quantise x [DIMS] with one fp32 scale into entry `place` of a plane of keys."""
    exponent = scale_exponent(tl.max(tl.abs(x), axis=0))
    tl.store(plane + place * DIMS + tl.arange(0, DIMS), encode_e4m3(x * power_of_2(254 - exponent)))
    scale = (plane + ENTRIES * DIMS + place * 4).to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(scale, power_of_2(exponent))


@jit
def store_mxfp4_key(
    x: tl.tensor, plane: tl.tensor, place: tl.tensor, ENTRIES: tl.constexpr, DIMS: tl.constexpr
) -> None:
    """Quantise x [DIMS] in groups of 32 into entry `place` of a plane of keys, two codes a byte."""
    groups: tl.constexpr = DIMS // 32
    grouped = tl.reshape(x, [groups, 32])
    # The largest magnitude by its bits: integers order as the floats do, with NaN above all.
    exponent = mx_exponent(tl.max(grouped.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1))  # [groups]
    finite = exponent < 255
    inverse = tl.where(finite, power_of_2(254 - exponent), 1.0)
    code = tl.where(finite[:, None], encode_e2m1(grouped * inverse[:, None]), 0)
    low, high = tl.split(tl.reshape(code, [DIMS // 2, 2]))
    value = plane + place * (DIMS // 2) + tl.arange(0, DIMS // 2)
    tl.store(value, (low | (high << 4)).to(tl.uint8))
    scale = plane + ENTRIES * (DIMS // 2) + place * groups + tl.arange(0, groups)
    tl.store(scale, exponent.to(tl.uint8))


@jit
def store_row(
    x: tl.tensor,
    plane: tl.tensor,
    place: tl.tensor,
    ENTRIES: tl.constexpr,
    NOPE: tl.constexpr,
    DIMS: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Quantise x [BLOCK_D] into entry `place` of a plane of rows: nope groups of 64, rope as bf16."""
    groups: tl.constexpr = BLOCK_D // 64
    value_bytes: tl.constexpr = NOPE + 2 * (DIMS - NOPE)
    dim = tl.arange(0, BLOCK_D)
    value = plane + place * value_bytes
    nope = tl.reshape(tl.where(dim < NOPE, x, 0.0), [groups, 64])
    exponent = scale_exponent(tl.max(tl.abs(nope), axis=1))  # [groups]
    code = encode_e4m3(nope * power_of_2(254 - exponent)[:, None])
    tl.store(value + dim, tl.reshape(code, [BLOCK_D]), mask=dim < NOPE)
    rope = (value + NOPE + 2 * (dim - NOPE)).to(tl.pointer_type(tl.uint16), bitcast=True)
    tl.store(rope, encode_bf16(x), mask=(dim >= NOPE) & (dim < DIMS))
    scale = plane + ENTRIES * value_bytes + place * SCALE_BYTES
    group = tl.arange(0, groups)
    tl.store(scale + group, exponent.to(tl.uint8), mask=group * 64 < NOPE)
    pad = tl.arange(0, BLOCK_D // 64 * 8)
    tl.store(scale + pad, tl.zeros_like(pad).to(tl.uint8), mask=(pad * 64 >= NOPE) & (pad < SCALE_BYTES))
