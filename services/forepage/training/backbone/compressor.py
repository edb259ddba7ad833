"""Token-level compressor for training: every entry of all packed documents at once.

The maths is that of `model/compressor.py`. Documents begin on multiples of 128 tokens, so an entry never
reaches over a boundary, except through the A halves of the window before: those are void in a first entry.
"""

import torch
from torch import Tensor, nn

from forepage.kv.geometry import C4_RATIO
from forepage.model.spec import ModelSpec
from forepage.training.backbone.maths import fp8_rounded, linear, rms_norm, rotate

VOID = -1e30
"""A gate that gives no weight; finite, because a softmax over infinities has no gradient."""


class Compressor(nn.Module):
    """wkv and wgate [C, D], norm [d], ape [ratio, C]; C = 2 d where windows overlap, else d."""

    def __init__(self, spec: ModelSpec, *, ratio: int, dims: int) -> None:
        super().__init__()
        width = 2 * dims if ratio == C4_RATIO else dims
        self.wkv = nn.Parameter(torch.empty(width, spec.hidden_size))
        self.wgate = nn.Parameter(torch.empty(width, spec.hidden_size))
        self.norm = nn.Parameter(torch.empty(dims))
        self.ape = nn.Parameter(torch.empty(ratio, width))
        self.ratio = ratio
        self._dims = dims
        self._eps = spec.norm_eps

    def rows(self, x: Tensor, cos: Tensor, sin: Tensor, first: Tensor, fp8_share: Tensor) -> Tensor:
        """As `forward`, rounded as the cache asks, in the dtype of x."""
        entries = self(x, cos, sin, first)
        return fp8_rounded(entries, 2 * cos.shape[-1], fp8_share).to(x.dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, first: Tensor) -> Tensor:
        """x [n, D]; N = n / ratio: rotation [N, rope / 2] of the entries, first bool [N] -> f32 [N, d]."""
        kv = linear(x, self.wkv).float().unflatten(0, (-1, self.ratio))  # [n / ratio, ratio, C]
        gate = linear(x, self.wgate).float().unflatten(0, (-1, self.ratio)) + self.ape
        if self.ratio == C4_RATIO:
            kv = torch.cat((_previous(kv[..., : self._dims]), kv[..., self._dims :]), dim=1)
            before = _previous(gate[..., : self._dims]).masked_fill(first[:, None, None], VOID)
            gate = torch.cat((before, gate[..., self._dims :]), dim=1)
        pooled = (torch.softmax(gate, dim=1) * kv).sum(1)
        return rotate(rms_norm(pooled, self.norm, self._eps), cos, sin)


def _previous(halves: Tensor) -> Tensor:
    """Each window's predecessor; the first gets its own, which its gate voids."""
    return torch.cat((halves[:1], halves[:-1]))
