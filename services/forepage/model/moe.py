"""Mixture of experts: hash-routed in the first layers, score-routed after them, one shared expert always on.

Routing runs in fp32. No path reads a value back to the host, so a decode step can be captured in a graph:
with few experts each one runs on every token; with many, tokens are sorted by expert for a grouped product.
Source: DeepSeek-V4 (sqrt-softplus scores, selection-only bias, clamped SwiGLU; the shared expert clamps too).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from forepage.model.rank_group import ALONE, RankGroup
from forepage.model.spec import ModelSpec
from forepage.model.tensor_parallel import rank_experts
from forepage.model.weights import side_by_side

DENSE_EXPERTS = 16
"""Up to so many experts, all run on all tokens: cheaper than sorting, which small models would feel."""
_MIN_WEIGHT_SUM = 1e-20


@dataclass(frozen=True)
class Gate:
    """Which experts a token goes to, and how much each counts.

    weight f32 [E, D]; expert_ids i64 [vocab, k] in hash layers, else bias f32 [E].
    """

    weight: Tensor
    bias: Tensor | None
    expert_ids: Tensor | None
    spec: ModelSpec

    def route(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, D], tokens i64 [n] -> experts i64 [n, k], weights f32 [n, k]."""
        scores = F.softplus(F.linear(x.float(), self.weight)).sqrt()  # [n, E]
        if self.expert_ids is not None:
            experts = self.expert_ids[tokens]
        else:
            biased = scores if self.bias is None else scores + self.bias
            experts = biased.topk(self.spec.experts_per_token, dim=-1).indices
        chosen = scores.gather(-1, experts)  # [n, k]
        weights = chosen / (chosen.sum(-1, keepdim=True) + _MIN_WEIGHT_SUM) * self.spec.routed_scale
        return experts, weights


@dataclass(frozen=True)
class MixtureOfExperts:
    """One layer's feed-forward: experts w13 [E, 2M, D] (gate over up), w2 [E, D, M], and the shared one.

    Of several ranks each has E whole experts of its own, from `first_expert` on, and all of the rest.
    """

    gate: Gate
    w13: Tensor
    w2: Tensor
    shared_w13: Tensor
    shared_w2: Tensor
    spec: ModelSpec
    first_expert: int
    ranks: RankGroup

    @classmethod
    def from_weights(
        cls, weights: Mapping[str, Tensor], prefix: str, spec: ModelSpec, ranks: RankGroup = ALONE
    ) -> "MixtureOfExperts":
        """Read `{prefix}gate.*`, the rank's `experts.*`, and `shared_experts.*`."""
        gate = Gate(
            weight=weights[f"{prefix}gate.weight"],
            bias=weights.get(f"{prefix}gate.bias"),
            expert_ids=weights.get(f"{prefix}gate.tid2eid"),
            spec=spec,
        )

        mine = rank_experts(spec, ranks.rank, ranks.num_ranks)
        experts = [f"{prefix}experts.{e}." for e in mine]
        gate_and_up = [weights[f"{expert}{w}.weight"] for expert in experts for w in ("w1", "w3")]
        shared = [weights[f"{prefix}shared_experts.{w}.weight"] for w in ("w1", "w3")]
        return cls(
            gate=gate,
            w13=side_by_side(gate_and_up).view(len(mine), 2 * spec.expert_size, -1),
            w2=side_by_side([weights[f"{expert}w2.weight"] for expert in experts]),
            shared_w13=side_by_side(shared).flatten(0, 1),
            shared_w2=weights[f"{prefix}shared_experts.w2.weight"],
            spec=spec,
            first_expert=mine.start,
            ranks=ranks,
        )

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x [n, D], tokens i64 [n] -> [n, D]."""
        experts, weights = self.gate.route(x, tokens)
        run = self._dense if self.spec.num_experts <= DENSE_EXPERTS else self._grouped
        shared = F.linear(self._activate(F.linear(x, self.shared_w13)), self.shared_w2)
        routed = self.ranks.all_reduce(run(x, experts, weights))  # fp32; the shared expert is added once
        return (routed + shared.float()).to(x.dtype)

    def _dense(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Every expert of the rank on every token, unchosen ones weighted zero -> f32 [n, D]."""
        shape = (x.shape[0], self.spec.num_experts)
        share = torch.zeros(shape, device=x.device).scatter_add(-1, experts, weights)
        share = share[:, self.first_expert : self.first_expert + self.w2.shape[0]]  # [n, E]
        hidden = self._activate(torch.matmul(x, self.w13.transpose(-1, -2)))  # [E, n, M]
        outputs = torch.bmm(hidden, self.w2.transpose(-1, -2))  # [E, n, D]
        return torch.einsum("end,ne->nd", outputs.float(), share)

    def _grouped(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Tokens sorted by expert, one grouped product per matrix -> f32 [n, D].

        Other ranks' choices sort behind the last group, where the products leave memory as it was: zeroed.
        """
        num_chosen, num_mine = experts.shape[-1], self.w2.shape[0]
        local = experts.flatten() - self.first_expert  # [n*k]
        local = torch.where((local >= 0) & (local < num_mine), local, num_mine)
        by_expert = local.argsort(stable=True)  # [n*k]
        ids = torch.arange(num_mine, device=x.device)
        ends = (local == ids.unsqueeze(1)).sum(1).cumsum(0).to(torch.int32)  # [E]
        inputs = x[by_expert // num_chosen]  # [n*k, D]
        hidden = self._activate(F.grouped_mm(inputs, self.w13.transpose(-1, -2), offs=ends))
        sorted_outputs = F.grouped_mm(hidden, self.w2.transpose(-1, -2), offs=ends)  # [n*k, D]
        is_mine = (local[by_expert] < num_mine).unsqueeze(1)
        sorted_outputs = torch.where(is_mine, sorted_outputs, 0)
        outputs = torch.empty_like(sorted_outputs).index_copy(0, by_expert, sorted_outputs)
        return torch.einsum("nkd,nk->nd", outputs.float().view(x.shape[0], num_chosen, -1), weights)

    def _activate(self, gate_up: Tensor) -> Tensor:
        """silu(min(gate, limit)) * clamp(up, -limit, limit), in fp32: [..., 2M] -> [..., M]."""
        gate, up = gate_up.float().chunk(2, dim=-1)
        limit = self.spec.swiglu_limit
        return (F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)).to(gate_up.dtype)
