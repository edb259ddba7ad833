"""Plain torch row_norm."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See the package."""
    return (unit_rms(x, eps) * weight).to(x.dtype)


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """See the package."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
