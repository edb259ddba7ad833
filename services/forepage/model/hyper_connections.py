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
from forepage_kernels.mix_streams import MixParameters, collapse_streams, expand_streams, project_streams


@dataclass(frozen=True)
class StreamMix:
    """How one sublayer's output returns to the streams: post f32 [n, S], comb f32 [n, S, S]."""

    post: Tensor
    comb: Tensor


@dataclass(frozen=True)
class HyperConnection:
    """One site (S streams of D dims): fn f32 [(2+S)*S, S*D], and what mixes with its products."""

    fn: Tensor
    how: MixParameters

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor], prefix: str, spec: ModelSpec) -> "HyperConnection":
        """Read `{prefix}_fn`, `_base` and `_scale`."""
        fn, base, scale = (weights[f"{prefix}_{name}"] for name in ("fn", "base", "scale"))
        return cls(fn, MixParameters(base, scale, spec.hc_eps, spec.norm_eps, spec.hc_sinkhorn_iters))

    def collapse(self, streams: Tensor, norm_weight: Tensor | None = None) -> tuple[Tensor, StreamMix]:
        """streams [n, S, D] -> the sublayer's input [n, D], normed if f32 [D] is given, and the way back."""
        projected = project_streams(streams, self.fn)  # [P, n, (2+S)*S]
        x, post, comb = collapse_streams(streams, projected, norm_weight, self.how)
        return x, StreamMix(post, comb)


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
    return expand_streams(output, streams, mix.post, mix.comb)


def _project(streams: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """(v fn^T) / rms(v) over all streams at once: [n, S, D] -> [n, rows of fn]."""
    flat = streams.flatten(-2).float()  # [n, S*D]
    inverse_rms = torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    return F.linear(flat, fn) * inverse_rms


def _weighted_sum(weights: Tensor, streams: Tensor) -> Tensor:
    """weights [n, S], streams [n, S, D] -> [n, D]."""
    return torch.bmm(weights.unsqueeze(-2), streams.float()).squeeze(-2).to(streams.dtype)
