# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""The Triton tile both indexers share: weighted ReLU scores of a tile of stored keys.

Stored keys are exact in bf16 and queries are rounded to it, so each product is exact and is summed in fp32:
one pass over the tensor cores, and decode, prefill, audits and the references mean the same number.
"""

import triton.language as tl
from torch import Tensor

from forepage_kernels.codec import load_f32, load_mxfp4
from forepage_kernels.jit import is_interpreted, jit, next_power_of_2

TILE_ENTRIES = 128
MIN_TILE_HEADS = 16
"""The smallest side of a matrix product on tensor cores."""


def tile_heads(heads: int, most: int) -> int:
    """Heads scored at a time, at most so many."""
    return min(most, max(MIN_TILE_HEADS, next_power_of_2(heads)))


def rounded_queries(queries: Tensor) -> Tensor:
    """The queries as kernels take them: compiled ones round for themselves, the interpreter can't."""
    return queries.bfloat16().float() if is_interpreted() else queries


@jit
def score_keys(
    queries: tl.tensor,
    weights: tl.tensor,
    num_heads: tl.tensor,
    keys: tl.tensor,
    value_offset: tl.tensor,
    scale_offset: tl.tensor,
    present: tl.tensor,
    N: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BF16: tl.constexpr,
    MXFP4: tl.constexpr,
) -> tl.tensor:
    """sum over heads of weight * relu(q . k) -> f32 [N]; 0 where not present, and nothing read there.

    queries points at [H, DIMS], weights at f32 [H], keys at bytes; value_offset, scale_offset i64 [N].
    No score of one head leaves the tile. An fp8 key's one scale is positive, so it is applied after the
    ReLU; an mxfp4 key's scales are in its values. Callers promise the compiler that value_offset is a
    multiple of 8 (a promise made in here would be about a parameter, and lost when this is inlined).
    Without BF16 (the interpreter, whose bf16 is wrong) everything stays fp32.
    """
    dim = tl.arange(0, DIMS)
    if MXFP4:
        key, scale = load_mxfp4(keys + value_offset, keys + scale_offset, present, N, DIMS)
    else:
        code = tl.load(keys + value_offset[:, None] + dim[None, :], mask=present[:, None], other=0)
        key = code.to(tl.float8e4nv, bitcast=True)  # [N, DIMS]
        scale = load_f32(keys + scale_offset, present)  # [N]
    key = key.to(tl.bfloat16) if BF16 else key.to(tl.float32)
    total = tl.zeros_like(scale)
    for first in range(0, num_heads, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        real = head < num_heads
        query = tl.load(queries + head[:, None] * DIMS + dim[None, :], mask=real[:, None], other=0.0)
        query = query.to(tl.bfloat16) if BF16 else query.to(tl.float32)
        weight = tl.load(weights + head, mask=real, other=0.0)
        dot = tl.dot(key, tl.trans(query), input_precision="ieee")  # [N, BLOCK_H]
        total += tl.sum(tl.maximum(dot, 0.0) * weight[None, :], axis=1)
    return total * scale
