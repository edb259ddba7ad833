"""Exact, deterministic top-k of the indexer's scores."""

import torch
from torch import Tensor

from forepage_kernels.checks import check_tensor
from forepage_kernels.errors import ShapeError
from forepage_kernels.select_topk import reference


def select_topk(logits: Tensor, k: int) -> Tensor:
    """Indices of the k largest entries above -inf, in ascending index order, padded with -1 at the end.

    Shapes: logits f32 [B, N] -> i64 [B, k]; k may exceed N. Equal values (0.0 and -0.0 are equal) go
    to the lower index. NaN is never selected.
    """
    check_tensor("logits", logits, dtype=torch.float32, shape=[None, None])
    if k < 1:
        raise ShapeError(f"k: must be at least 1, got {k}")
    if logits.is_cuda:
        from forepage_kernels.select_topk.kernel import select_topk as launch

        return launch(logits, k)
    return reference.select_topk(logits, k)
