"""Plain torch compress_quantize."""

import torch
from torch import Tensor

from forepage_kernels.layout import KeyPool, RowPool, hadamard, store_rows


def compress_quantize(
    kv: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    pool: RowPool | KeyPool,
    slots: Tensor,
    *,
    rope_dims: int,
    eps: float,
) -> None:
    """See the package."""
    present = slots >= 0
    kv, gate, cos, sin = kv[present], gate[present], cos[present], sin[present]
    kv = torch.where(gate.isneginf(), 0.0, kv)  # whatever lies where no token was
    pooled = (torch.softmax(gate, dim=1) * kv).sum(dim=1)  # [n, d]
    normed = pooled * torch.rsqrt(pooled.square().mean(dim=1, keepdim=True) + eps) * norm_weight
    entry = _rope(normed, cos, sin, rope_dims)
    if isinstance(pool, KeyPool) and pool.layout.rotated:
        entry = hadamard(entry)
    store_rows(pool, slots[present], entry)


def _rope(x: Tensor, cos: Tensor, sin: Tensor, rope_dims: int) -> Tensor:
    """Turn the interleaved pairs of the trailing rope_dims of x f32 [n, d]."""
    nope = x.shape[1] - rope_dims
    even, odd = x[:, nope:].reshape(x.shape[0], rope_dims // 2, 2).unbind(2)  # [n, rope_dims / 2] each
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=2).flatten(1)
    return torch.cat((x[:, :nope], turned), dim=1)
