"""Hyper-connections for training: four residual streams, mixed around every sublayer.

The maths is that of `model/hyper_connections.py`. Streams keep the compute dtype, mixing weights are fp32.
"""

import torch
from torch import Tensor, nn

from forepage.model.spec import ModelSpec
from forepage.training.backbone.maths import linear
from forepage.training.backbone.sinkhorn import sinkhorn


class HyperConnection(nn.Module):
    """One sublayer's site: fn [(2+S)*S, S*D], base [(2+S)*S], scale [3]."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        streams = spec.hc_mult
        outputs = (2 + streams) * streams
        self.fn = nn.Parameter(torch.empty(outputs, streams * spec.hidden_size))
        self.base = nn.Parameter(torch.empty(outputs))
        self.scale = nn.Parameter(torch.empty(3))
        self._spec = spec

    def collapse(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """streams [n, S, D] -> input of the sublayer [n, D], post f32 [n, S], comb f32 [n, S, S]."""
        spec, count = self._spec, self._spec.hc_mult
        mixed = projected(streams, self.fn, spec.norm_eps)
        pre = torch.sigmoid(mixed[:, :count] * self.scale[0] + self.base[:count]) + spec.hc_eps
        post = 2 * torch.sigmoid(mixed[:, count : 2 * count] * self.scale[1] + self.base[count : 2 * count])
        comb = mixed[:, 2 * count :] * self.scale[2] + self.base[2 * count :]
        comb = sinkhorn(comb.view(-1, count, count), spec.hc_sinkhorn_iters, spec.hc_eps)
        return weighted_sum(pre, streams), post, comb

    def expand(self, output: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """stream k <- post_k * output + sum_j comb[j, k] * stream_j."""
        output = output.float()
        old = [streams[:, j].float() for j in range(self._spec.hc_mult)]
        new = []
        for k in range(self._spec.hc_mult):
            stream = post[:, k, None] * output
            for j, other in enumerate(old):
                stream = stream + comb[:, j, k, None] * other
            new.append(stream)
        return torch.stack(new, dim=1).to(streams.dtype)


class HyperHead(nn.Module):
    """The last collapse: fn [S, S*D], base [S], scale [1]."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.fn = nn.Parameter(torch.empty(spec.hc_mult, spec.hc_mult * spec.hidden_size))
        self.base = nn.Parameter(torch.empty(spec.hc_mult))
        self.scale = nn.Parameter(torch.empty(1))
        self._spec = spec

    def collapse(self, streams: Tensor) -> Tensor:
        """streams [n, S, D] -> [n, D]."""
        mixed = projected(streams, self.fn, self._spec.norm_eps)
        return weighted_sum(torch.sigmoid(mixed * self.scale + self.base) + self._spec.hc_eps, streams)


def projected(streams: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """(v fn^T) / rms(v) over all streams at once: [n, S, D] -> f32 [n, rows of fn]."""
    flat = streams.flatten(1)
    inverse_rms = torch.rsqrt(flat.float().square().mean(-1, keepdim=True) + norm_eps)
    return linear(flat, fn).float() * inverse_rms


def weighted_sum(weights: Tensor, streams: Tensor) -> Tensor:
    """weights f32 [n, S], streams [n, S, D] -> [n, D]; a plain sum, which fuses into its neighbours."""
    total = weights[:, 0, None] * streams[:, 0].float()
    for idx in range(1, weights.shape[1]):
        total = total + weights[:, idx, None] * streams[:, idx].float()
    return total.to(streams.dtype)
