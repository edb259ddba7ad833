"""RMS norms: fp32 inside, one cast at the end."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., d] / rms(x) * weight f32 [d]; dtype of x out."""
    return (unit_rms(x, eps) * weight).to(x.dtype)


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """x [..., d] / rms(x) in fp32, no weight."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
