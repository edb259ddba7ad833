"""Lookahead scores: how likely each compressed entry is to be needed within the interval."""

import torch
from torch import Tensor

from forepage_kernels.checks import check_arena, check_tensor
from forepage_kernels.layout import KeyLayout
from forepage_kernels.memory_indexer import reference


def memory_indexer(
    queries: Tensor,
    weights: Tensor,
    keys: Tensor,
    *,
    layout: KeyLayout,
    plane_offsets: Tensor,
    threshold: float,
) -> Tensor:
    """Max over target layers of sigmoid(sum over heads of weight * relu(q . k)), gated by a threshold.

    Shapes: queries f32|bf16 [B, L, H, D] (rotated like the stored keys), weights f32 [B, L, H],
    keys u8 [A] flat bytes, plane_offsets i64 [B, M, L] bytes -> f32 [B, M * entries].
    A negative offset is an absent plane. Scores at or below the threshold, and of entries absent in
    every layer, are 0. With quantised keys queries are rounded to bf16 first. With CUDA queries `keys`
    may be host memory registered with CUDA.
    Source: FlashMemory's trained scorer over DeepSeek-V4's own indexer keys.
    """
    check_tensor(
        "queries", queries, dtype=(torch.float32, torch.bfloat16), shape=[None, None, None, layout.dims]
    )
    batch, layers, heads, _ = queries.shape
    device = queries.device
    check_tensor("weights", weights, dtype=torch.float32, shape=[batch, layers, heads], device=device)
    check_arena("keys", keys, device=device)
    check_tensor(
        "plane_offsets", plane_offsets, dtype=torch.int64, shape=[batch, None, layers], device=device
    )
    if queries.is_cuda and layout.format != "fp32":
        from forepage_kernels.memory_indexer.kernel import memory_indexer as launch

        return launch(queries, weights, keys, layout=layout, plane_offsets=plane_offsets, threshold=threshold)
    return reference.memory_indexer(
        queries, weights, keys, layout=layout, plane_offsets=plane_offsets, threshold=threshold
    )
