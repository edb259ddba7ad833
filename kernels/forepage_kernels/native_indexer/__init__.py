"""The model's own Lightning Indexer over the resident entries."""

import torch
from torch import Tensor

from forepage_kernels.checks import check_arena, check_tensor
from forepage_kernels.layout import KeyPool
from forepage_kernels.native_indexer import reference


def native_indexer(
    q: Tensor, weights: Tensor, pool: KeyPool, *, block_table: Tensor, visible: Tensor
) -> Tensor:
    """Score resident entries: sum over heads of weight * relu(q . k); -inf where absent or not visible.

    Shapes: q f32 [B, H, D] (rotated like the stored keys), weights f32 [B, H] (signed),
    block_table i32 [B, M] block_idx -> block id (negative = absent), visible i64 [B] entries
    -> f32 [B, M * entries]. With CUDA queries the pool may be host memory registered with CUDA
    (quantised keys only). With quantised keys q is rounded to bf16 first; fp32 all the way after that.
    Source: DeepSeek-V4 inference/model.py, Indexer.forward.
    """
    device = q.device
    check_tensor("q", q, dtype=torch.float32, shape=[None, None, pool.layout.dims])
    check_arena("pool", pool.bytes.view(-1), device=device)
    check_tensor("weights", weights, dtype=torch.float32, shape=q.shape[:2], device=device)
    check_tensor("block_table", block_table, dtype=torch.int32, shape=[q.shape[0], None], device=device)
    check_tensor("visible", visible, dtype=torch.int64, shape=[q.shape[0]], device=device)
    if q.is_cuda and pool.layout.format != "fp32":
        from forepage_kernels.native_indexer.kernel import native_indexer as launch

        return launch(q, weights, pool, block_table=block_table, visible=visible)
    return reference.native_indexer(q, weights, pool, block_table=block_table, visible=visible)
