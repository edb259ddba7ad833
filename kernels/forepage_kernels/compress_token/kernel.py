# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton compress_token: one program a sequence; only a window that closes is read.

The token's own state is taken from registers, not read back: threads don't see each other's stores.
"""

from typing import TYPE_CHECKING

import triton.language as tl
from torch import Tensor

from forepage_kernels.codec import plane_base
from forepage_kernels.compress_quantize.kernel import hadamard, store_key, store_mxfp4_key, store_row, turn
from forepage_kernels.jit import jit, jit_unspecialised, next_power_of_2, on_device_of
from forepage_kernels.layout import SCALE_GROUP, KeyLayout, KeyPool, RowLayout, RowPool

if TYPE_CHECKING:
    from forepage_kernels.compress_token import Window

MAX_TILE_TOKENS = 8


def compress_token(
    projected: Tensor,
    state: Tensor,
    slots: Tensor,
    positions: Tensor,
    how: "Window",
    *,
    pool: RowPool | KeyPool,
    targets: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> None:
    """See the package; quantised pools. A target past the pool stores nothing."""
    batch, layout = slots.shape[0], pool.layout
    if batch == 0:
        return
    with on_device_of(projected):
        take_token[(batch,)](
            projected,
            how.position_bias,
            state,
            slots,
            positions,
            how.norm_weight,
            cos,
            sin,
            pool.bytes,
            targets,
            state.stride(0),
            pool.num_slots,
            pool.block_bytes,
            pool.layer_offset,
            how.eps,
            layout.dims**-0.5,
            RATIO=how.ratio,
            OVERLAPS=how.overlaps,
            ENTRIES=layout.entries,
            DIMS=layout.dims,
            ROPE=how.rope_dims,
            NOPE=layout.nope_dims if isinstance(layout, RowLayout) else layout.dims,
            SCALE_BYTES=layout.scale_bytes,
            IS_KEY=isinstance(layout, KeyLayout),
            MXFP4=layout.format == "mxfp4",
            TILE_W=min(MAX_TILE_TOKENS, next_power_of_2(how.ratio * (2 if how.overlaps else 1))),
            BLOCK_D=max(SCALE_GROUP, next_power_of_2(layout.dims)),
        )


@jit_unspecialised("num_slots")
def take_token(
    projected: tl.tensor,
    position_bias: tl.tensor,
    state: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    norm_weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    pool: tl.tensor,
    targets: tl.tensor,
    slot_stride: tl.tensor,
    num_slots: tl.tensor,
    block_bytes: tl.tensor,
    layer_offset: tl.tensor,
    eps: tl.tensor,
    hadamard_scale: tl.tensor,
    RATIO: tl.constexpr,
    OVERLAPS: tl.constexpr,
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
    """Shapes as in the package."""
    halves: tl.constexpr = 2 if OVERLAPS else 1
    channels: tl.constexpr = DIMS * halves
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row)
    here = position % (RATIO * halves)
    kv_state = state + tl.load(slots + row) * slot_stride
    gate_state = kv_state + RATIO * halves * channels
    kv_row = projected + row * 2 * channels
    bias = position_bias + position % RATIO * channels
    dim = tl.arange(0, BLOCK_D)
    inside = dim < DIMS
    for half in tl.static_range(halves):
        channel = half * DIMS + dim
        kv = tl.load(kv_row + channel, mask=inside, other=0.0)
        gate = tl.load(kv_row + channels + channel, mask=inside, other=0.0)
        gate += tl.load(bias + channel, mask=inside, other=0.0)
        tl.store(kv_state + here * channels + channel, kv, mask=inside)
        tl.store(gate_state + here * channels + channel, gate, mask=inside)
    # What is left in kv and gate is the half that the token's own window pools.
    target = tl.load(targets + row)
    if (target >= 0) & (target < num_slots):
        pooled = pool_window(
            kv_state, gate_state, kv, gate, position, here, RATIO, OVERLAPS, DIMS, TILE_W, BLOCK_D
        )
        mean = tl.sum(tl.where(inside, pooled * pooled, 0.0), axis=0) / DIMS
        weight = tl.load(norm_weight + dim, mask=inside, other=0.0)
        entry = pooled * tl.rsqrt(mean + eps) * weight
        entry = turn(entry, cos + row * (ROPE // 2), sin + row * (ROPE // 2), DIMS, ROPE, BLOCK_D)
        plane = pool + plane_base(target, block_bytes, layer_offset, ENTRIES)
        if IS_KEY:
            entry = hadamard(entry, DIMS) * hadamard_scale
            if MXFP4:
                store_mxfp4_key(entry, plane, target % ENTRIES, ENTRIES, DIMS)
            else:
                store_key(entry, plane, target % ENTRIES, ENTRIES, DIMS)
        else:
            store_row(entry, plane, target % ENTRIES, ENTRIES, NOPE, DIMS, SCALE_BYTES, BLOCK_D)


@jit
def pool_window(
    kv_state: tl.tensor,
    gate_state: tl.tensor,
    own_kv: tl.tensor,
    own_gate: tl.tensor,
    position: tl.tensor,
    here: tl.tensor,
    RATIO: tl.constexpr,
    OVERLAPS: tl.constexpr,
    DIMS: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Per-channel softmax of the window's gates, applied to its values -> f32 [BLOCK_D]."""
    width: tl.constexpr = 2 * RATIO if OVERLAPS else RATIO
    channels: tl.constexpr = 2 * DIMS if OVERLAPS else DIMS
    dim = tl.arange(0, BLOCK_D)[None, :]
    top = tl.full([BLOCK_D], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    first = (position // RATIO % 2) * RATIO if OVERLAPS else position * 0  # place of the own window
    for start in range(0, width, TILE_W):
        token = start + tl.arange(0, TILE_W)[:, None]
        present = token < width
        if OVERLAPS:  # the window before, by its A half, then the own one by its B half
            is_own = token >= RATIO
            place = tl.where(is_own, first + token - RATIO, RATIO - first + token)
            channel = tl.where(is_own, DIMS, 0) + dim
            present = present & (is_own | (position >= RATIO))
            is_here = is_own & (place == here)
        else:
            place, channel = first + token, dim
            is_here = place == here
        read = present & (dim < DIMS)
        g = tl.load(gate_state + place * channels + channel, mask=read & (is_here == 0), other=float("-inf"))
        g = tl.where(is_here & (dim < DIMS), own_gate[None, :], g)
        g = tl.where(dim < DIMS, g, 0.0)
        stored = read & (is_here == 0) & (g > float("-inf"))
        value = tl.load(kv_state + place * channels + channel, mask=stored, other=0.0)
        value = tl.where(is_here & (g > float("-inf")), own_kv[None, :], value)
        new_top = tl.maximum(top, tl.max(g, axis=0))
        base = tl.where(new_top > float("-inf"), new_top, 0.0)
        keep = tl.exp(top - base)
        p = tl.exp(g - base[None, :])
        total = total * keep + tl.sum(p, axis=0)
        acc = acc * keep + tl.sum(p * value, axis=0)
        top = new_top
    return acc / total
