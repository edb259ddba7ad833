"""Plain torch row_turn; the Hadamard transform is the byte formats' own (layout.py)."""

import torch
from torch import Tensor

from forepage_kernels.layout import hadamard as hadamard


def turn_pairs(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """See the package."""
    sin = -sin if inverse else sin
    turned_dims = 2 * cos.shape[-1]
    plain, rotary = x.split_with_sizes([x.shape[-1] - turned_dims, turned_dims], dim=-1)
    even, odd = rotary.float().unflatten(-1, (turned_dims // 2, 2)).unbind(-1)  # [..., r / 2] each
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((plain, turned.to(x.dtype)), dim=-1)
