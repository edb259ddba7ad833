"""A rank's routed experts, in the form they are held in: run on tokens, summed by routing weight.

No form reads a value back to the host, so a decode step can be captured in a graph. Plain experts: with few
each one runs on every token; with many, tokens are sorted by expert for a grouped product.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from forepage.model.spec import ModelSpec
from forepage.model.stored_form import SCALE_SUFFIX, WEIGHT_SUFFIX
from forepage.model.weights import side_by_side
from forepage_kernels.moe import Fp4Experts, moe

DENSE_EXPERTS = 16
"""Up to so many experts, all run on all tokens: cheaper than sorting, which small models would feel."""


class Experts(Protocol):
    """Experts first..first + E - 1 of the model's."""

    def run(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [n, D], chosen i64 [n, k] (of all ranks' experts), weights f32 [n, k] -> f32 [n, D]."""
        ...


@dataclass(frozen=True)
class PlainExperts:
    """Held in the model's dtype: w13 [E, 2M, D] (gate over up), w2 [E, D, M]."""

    w13: Tensor
    w2: Tensor
    first: int
    spec: ModelSpec

    def run(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """See the protocol."""
        run = self._dense if self.spec.num_experts <= DENSE_EXPERTS else self._grouped
        return run(x, chosen, weights)

    def _dense(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Every expert of the rank on every token, unchosen ones weighted zero."""
        shape = (x.shape[0], self.spec.num_experts)
        share = torch.zeros(shape, device=x.device).scatter_add(-1, chosen, weights)
        share = share[:, self.first : self.first + self.w2.shape[0]]  # [n, E]
        gate_up = torch.matmul(x, self.w13.transpose(-1, -2))  # [E, n, 2M]
        hidden = clamped_swiglu(gate_up, limit=self.spec.swiglu_limit)
        outputs = torch.bmm(hidden, self.w2.transpose(-1, -2))  # [E, n, D]
        return torch.einsum("end,ne->nd", outputs.float(), share)

    def _grouped(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Tokens sorted by expert, one grouped product per matrix.

        Other ranks' choices sort behind the last group, where the products leave memory as it was: zeroed.
        """
        num_chosen, num_mine = chosen.shape[-1], self.w2.shape[0]
        local = chosen.flatten() - self.first  # [n*k]
        local = torch.where((local >= 0) & (local < num_mine), local, num_mine)
        by_expert = local.argsort(stable=True)  # [n*k]
        ids = torch.arange(num_mine, device=x.device)
        ends = (local == ids.unsqueeze(1)).sum(1).cumsum(0).to(torch.int32)  # [E]
        inputs = x[by_expert // num_chosen]  # [n*k, D]
        gate_up = F.grouped_mm(inputs, self.w13.transpose(-1, -2), offs=ends)
        hidden = clamped_swiglu(gate_up, limit=self.spec.swiglu_limit)
        sorted_outputs = F.grouped_mm(hidden, self.w2.transpose(-1, -2), offs=ends)  # [n*k, D]
        is_mine = (local[by_expert] < num_mine).unsqueeze(1)
        sorted_outputs = torch.where(is_mine, sorted_outputs, 0)
        outputs = torch.empty_like(sorted_outputs).index_copy(0, by_expert, sorted_outputs)
        return torch.einsum("nkd,nk->nd", outputs.float().view(x.shape[0], num_chosen, -1), weights)


@dataclass(frozen=True)
class StoredExperts:
    """Held in MXFP4, as stored."""

    experts: Fp4Experts
    limit: float

    def run(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """See the protocol."""
        return moe(x, chosen, weights, self.experts, limit=self.limit)


def experts_of(weights: Mapping[str, Tensor], prefix: str, spec: ModelSpec, mine: range) -> Experts:
    """Read `{prefix}experts.{e}.*` of the rank's experts, in the form that `weights` has them."""
    names = [f"{prefix}experts.{expert}." for expert in mine]
    w13 = [f"{name}{matrix}" for name in names for matrix in ("w1", "w3")]
    w2 = [f"{name}w2" for name in names]

    def together(matrices: list[str], suffix: str) -> Tensor:
        tensors = side_by_side([weights[matrix + suffix] for matrix in matrices])
        return tensors.view(len(mine), -1, tensors.shape[-1])  # [E, rows, columns]

    if w2[0] + SCALE_SUFFIX not in weights:
        return PlainExperts(together(w13, WEIGHT_SUFFIX), together(w2, WEIGHT_SUFFIX), mine.start, spec)
    stored = Fp4Experts(
        w13=together(w13, WEIGHT_SUFFIX),
        w13_scales=together(w13, SCALE_SUFFIX).view(torch.uint8),
        w2=together(w2, WEIGHT_SUFFIX),
        w2_scales=together(w2, SCALE_SUFFIX).view(torch.uint8),
        first=mine.start,
        total=spec.num_experts,
    )
    return StoredExperts(stored, spec.swiglu_limit)


def clamped_swiglu(gate_up: Tensor, *, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), in fp32: [..., 2M] -> [..., M]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)).to(gate_up.dtype)
