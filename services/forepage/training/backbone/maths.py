"""What several parts of the training network compute: norms, rotation, the cache's FP8 rounding.

The same maths as inference (`model/norm.py`, `model/rope.py`, the kernels' row format), written so that a
compiler can fuse it and gradients pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE_GROUP = 64
MIN_AMAX = 1e-4
MAX_E4M3 = 448.0


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T in the dtype of x; the weight is an fp32 master."""
    return F.linear(x, weight.to(x.dtype))


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """x [..., d] over its root mean square, in fp32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """unit_rms times weight, in the dtype of x."""
    return (unit_rms(x, eps) * weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs of the trailing dims of f32 x [..., d]; cos, sin broadcast [..., rope/2]."""
    rope = 2 * cos.shape[-1]
    fixed, turned = x[..., :-rope], x[..., -rope:]
    pairs = turned.unflatten(-1, (rope // 2, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((fixed, turned), dim=-1)


def fp8_rounded(x: Tensor, rope_dims: int, share: Tensor) -> Tensor:
    """f32 x [..., d] as an FP8 row gives it back, where `share` (f32 scalar) is 1; as it is, where 0.

    The nope dims are rounded to e4m3 with a power-of-two scale per 64, the rope dims to bf16; the gradient
    passes straight through.
    """
    nope, rope = x[..., :-rope_dims], x[..., -rope_dims:]
    groups = nope.detach().unflatten(-1, (-1, SCALE_GROUP))
    amax = groups.abs().amax(-1, keepdim=True).clamp(min=MIN_AMAX)
    scale = torch.exp2(torch.ceil(torch.log2(amax / MAX_E4M3)))
    stored = (groups / scale).clamp(-MAX_E4M3, MAX_E4M3).to(torch.float8_e4m3fn).float() * scale
    nope_error = stored.flatten(-2) - nope.detach()
    rope_error = rope.detach().bfloat16().float() - rope.detach()
    return torch.cat((nope + share * nope_error, rope + share * rope_error), dim=-1)
