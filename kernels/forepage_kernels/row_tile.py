# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""The Triton tile that reads stored fp8 rows: decoded in registers, exact in bf16."""

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
    groups: tl.constexpr = BLOCK_D // 64
    present = slot >= 0
    plane = plane_base(slot, block_bytes, layer_offset, ENTRIES)
    entry = slot % ENTRIES
    value = pool + tl.multiple_of(plane + entry * value_bytes, 8)
    scale = pool + tl.multiple_of(plane + ENTRIES * value_bytes + entry * SCALE_BYTES, 8)
    group = tl.arange(0, groups)
    scaled = present[:, None] & (group * 64 < NOPE)[None, :]
    exponent = tl.load(scale[:, None] + group[None, :], mask=scaled, other=0).to(tl.int32)  # [N, groups]
    grouped_dim = group[:, None] * 64 + tl.arange(0, 64)[None, :]  # [groups, 64]
    nope = load_e4m3(
        value[:, None, None] + grouped_dim[None, :, :],
        present[:, None, None] & (grouped_dim < NOPE)[None, :, :],
    )
    nope = tl.reshape(nope * power_of_2(exponent)[:, :, None], [slot.shape[0], BLOCK_D])
    dim = tl.arange(0, BLOCK_D)
    is_rope = (dim >= NOPE) & (dim < DIMS)
    rope = load_bf16((value + NOPE)[:, None], (dim - NOPE)[None, :], present[:, None] & is_rope[None, :])
    return tl.where(is_rope[None, :], rope, nope)
