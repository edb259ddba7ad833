"""RMS norms of rows: fp32 inside, one cast at the end."""

import torch
from torch import Tensor

from forepage_kernels.checks import check_tensor
from forepage_kernels.errors import ShapeError
from forepage_kernels.row_norm import reference

DTYPES = (torch.float32, torch.bfloat16)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., d] / rms(x) * weight [d]; dtype of x out. x and weight f32 or bf16."""
    check_tensor("weight", weight, dtype=DTYPES, shape=[x.shape[-1]], device=x.device)
    _check_rows(x)
    if x.is_cuda:
        from forepage_kernels.row_norm.kernel import rms_norm as launch

        return launch(x, weight, eps, x.dtype)
    return reference.rms_norm(x, weight, eps)


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """x [..., d] / rms(x), f32 out, no weight."""
    _check_rows(x)
    if x.is_cuda:
        from forepage_kernels.row_norm.kernel import rms_norm as launch

        return launch(x, None, eps, torch.float32)
    return reference.unit_rms(x, eps)


def _check_rows(x: Tensor) -> None:
    if x.dtype not in DTYPES or x.dim() == 0:
        raise ShapeError(f"x: must be rows of f32 or bf16, got {x.dtype} {list(x.shape)}")
