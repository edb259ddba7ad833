"""Manifold-constrained hyper-connections: four residual streams, mixed around every sublayer.

Before a sublayer the streams collapse to one vector (`pre`); after it, its output is spread over the
streams (`post`) and the old streams are mixed by a doubly stochastic matrix (`comb`). All weights depend
on the token's own streams and are computed in fp32; the streams keep the model's dtype.
Source: DeepSeek-V4 section "mHC"; comb is used transposed (summed over its first index).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from forepage.model.spec import ModelSpec


@dataclass(frozen=True)
class StreamMix:
    """How one sublayer's output returns to the streams: post f32 [n, S], comb f32 [n, S, S]."""

    post: Tensor
    comb: Tensor


@dataclass(frozen=True)
class Sinkhorn:
    """Makes S x S matrices doubly stochastic. Sums are products with 0/1 matrices [S*S, S*S]:

    one operation gives every element the sum of its row (or column) plus eps, which halves the number of
    small operations, and this loop is most of what a hyper-connection costs.
    """

    row_sums: Tensor
    column_sums: Tensor
    eps: Tensor  # [S*S]
    iterations: int

    @classmethod
    def from_spec(cls, spec: ModelSpec, device: torch.device) -> "Sinkhorn":
        """For hc_mult streams."""
        ones = torch.ones(spec.hc_mult, spec.hc_mult)
        eye = torch.eye(spec.hc_mult)
        return cls(
            row_sums=torch.kron(eye, ones).to(device),
            column_sums=torch.kron(ones, eye).to(device),
            eps=torch.full((spec.hc_mult**2,), spec.hc_eps, device=device),
            iterations=spec.hc_sinkhorn_iters,
        )

    def balance(self, logits: Tensor) -> Tensor:
        """[n, S, S] -> rows and columns sum to about 1. The column step comes first and last."""
        comb = torch.softmax(logits, dim=-1).flatten(-2) + self.eps  # [n, S*S]
        comb = comb / torch.addmm(self.eps, comb, self.column_sums)
        for _ in range(self.iterations - 1):
            comb = comb / torch.addmm(self.eps, comb, self.row_sums)
            comb = comb / torch.addmm(self.eps, comb, self.column_sums)
        return comb.view(logits.shape)


@dataclass(frozen=True)
class HyperConnection:
    """One site's parameters (S streams of D dims): fn [(2+S)*S, S*D], base [(2+S)*S], scale [3]; fp32."""

    fn: Tensor
    base: Tensor
    scale: Tensor
    sinkhorn: Sinkhorn
    spec: ModelSpec

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor], prefix: str, spec: ModelSpec) -> "HyperConnection":
        """Read `{prefix}_fn`, `_base` and `_scale`."""
        fn, base, scale = (weights[f"{prefix}_{name}"] for name in ("fn", "base", "scale"))
        return cls(fn, base, scale, Sinkhorn.from_spec(spec, fn.device), spec)

    def collapse(self, streams: Tensor) -> tuple[Tensor, StreamMix]:
        """streams [n, S, D] -> the sublayer's input [n, D] and the way back."""
        num_streams, eps = self.spec.hc_mult, self.spec.hc_eps
        mixed = _project(streams, self.fn, self.spec.norm_eps)  # [n, (2+S)*S]
        sizes = [num_streams, num_streams, num_streams * num_streams]
        pre_x, post_x, comb_x = mixed.split_with_sizes(sizes, dim=-1)
        pre_b, post_b, comb_b = self.base.split_with_sizes(sizes)
        pre = torch.sigmoid(pre_x * self.scale[0] + pre_b) + eps
        post = 2 * torch.sigmoid(post_x * self.scale[1] + post_b)
        comb = comb_x * self.scale[2] + comb_b  # [n, S*S]
        comb = comb.view(-1, num_streams, num_streams)
        mix = StreamMix(post=post, comb=self.sinkhorn.balance(comb))
        return _weighted_sum(pre, streams), mix


@dataclass(frozen=True)
class HyperHead:
    """The last collapse before the final norm: fn [S, S*D], base [S], scale [1]; no mixing back."""

    fn: Tensor
    base: Tensor
    scale: Tensor
    spec: ModelSpec

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor], spec: ModelSpec) -> "HyperHead":
        """Read `hc_head_fn`, `_base` and `_scale`."""
        fn, base, scale = (weights[f"hc_head_{name}"] for name in ("fn", "base", "scale"))
        return cls(fn, base, scale, spec)

    def collapse(self, streams: Tensor) -> Tensor:
        """streams [n, S, D] -> [n, D]."""
        mixed = _project(streams, self.fn, self.spec.norm_eps)  # [n, S]
        return _weighted_sum(torch.sigmoid(mixed * self.scale + self.base) + self.spec.hc_eps, streams)


def expand(output: Tensor, streams: Tensor, mix: StreamMix) -> Tensor:
    """stream k <- post_k * output + sum_j comb[j, k] * stream_j; output [n, D], streams [n, S, D]."""
    spread = mix.post.unsqueeze(-1) * output.float().unsqueeze(-2)  # [n, S, D]
    return torch.baddbmm(spread, mix.comb.transpose(-1, -2), streams.float()).to(streams.dtype)


def _project(streams: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """(v fn^T) / rms(v) over all streams at once: [n, S, D] -> [n, rows of fn]."""
    flat = streams.flatten(-2).float()  # [n, S*D]
    inverse_rms = torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    return F.linear(flat, fn) * inverse_rms


def _weighted_sum(weights: Tensor, streams: Tensor) -> Tensor:
    """weights [n, S], streams [n, S, D] -> [n, D]."""
    return torch.bmm(weights.unsqueeze(-2), streams.float()).squeeze(-2).to(streams.dtype)
