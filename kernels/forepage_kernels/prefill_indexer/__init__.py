"""The model's own Lightning Indexer for consecutive tokens of one sequence, which share their keys."""

import torch
from torch import Tensor

from forepage_kernels.checks import check_tensor
from forepage_kernels.errors import ShapeError
from forepage_kernels.prefill_indexer import reference


def prefill_indexer(q: Tensor, weights: Tensor, keys: Tensor, *, start: int, ratio: int) -> Tensor:
    """Score the entries closed at each token: sum over heads of weight * relu(q . k); -inf for later ones.

    Shapes: q f32 [T, H, D] of tokens start..start + T - 1, weights f32 [T, H] (signed), keys f32|bf16 [N, D]
    -> f32 [T, N]; entry n is closed at token t when n < (t + 1) // ratio. With bf16 keys (quantised ones,
    decoded) q is rounded to bf16 first; fp32 all the way after that.
    Source: DeepSeek-V4 inference/model.py, Indexer.forward.
    """
    check_tensor("q", q, dtype=torch.float32, shape=[None, None, None])
    num_tokens, heads, dims = q.shape
    check_tensor("weights", weights, dtype=torch.float32, shape=[num_tokens, heads], device=q.device)
    dtypes = (torch.float32, torch.bfloat16)
    check_tensor("keys", keys, dtype=dtypes, shape=[None, dims], device=q.device)
    if start < 0 or ratio < 1:
        raise ShapeError(f"start: {start}, ratio {ratio}")
    # A tensor core takes 16 dims at least; wide tiles need a power of two.
    if q.is_cuda and keys.dtype == torch.bfloat16 and dims >= 16 and dims & (dims - 1) == 0:
        from forepage_kernels.prefill_indexer.kernel import prefill_indexer as launch

        return launch(q, weights, keys, start=start, ratio=ratio)
    return reference.prefill_indexer(q, weights, keys, start=start, ratio=ratio)
