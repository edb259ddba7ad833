"""Mixture of experts: hash-routed in the first layers, score-routed after them, one shared expert always on.

Routing runs in fp32. No path reads a value back to the host, so a decode step can be captured in a graph.
Source: DeepSeek-V4 (sqrt-softplus scores, selection-only bias, clamped SwiGLU; the shared expert clamps too).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from forepage.model.experts import Experts, clamped_swiglu, experts_of
from forepage.model.fp32_linear import fp32_linear
from forepage.model.rank_group import ALONE, RankGroup
from forepage.model.spec import ModelSpec
from forepage.model.tensor_parallel import rank_experts
from forepage.model.weight_matrix import WeightMatrix, matrix_of

_MIN_WEIGHT_SUM = 1e-20


@dataclass(frozen=True)
class Gate:
    """Which experts a token goes to, and how much each counts.

    weight f32|bf16 [E, D]; expert_ids i64 [vocab, k] in hash layers, else bias f32 [E].
    """

    weight: Tensor
    bias: Tensor | None
    expert_ids: Tensor | None
    spec: ModelSpec

    def route(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, D], tokens i64 [n] -> experts i64 [n, k], weights f32 [n, k]."""
        scores = F.softplus(fp32_linear(x, self.weight)).sqrt()  # [n, E]
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
    """One layer's feed-forward: the rank's routed experts, and the shared one (w13: gate over up).

    Of several ranks each has whole experts of its own, and all of the rest.
    """

    gate: Gate
    experts: Experts
    shared_w13: WeightMatrix
    shared_w2: WeightMatrix
    spec: ModelSpec
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
        shared = f"{prefix}shared_experts."
        return cls(
            gate=gate,
            experts=experts_of(weights, prefix, spec, rank_experts(spec, ranks.rank, ranks.num_ranks)),
            shared_w13=matrix_of(weights, f"{shared}w1", f"{shared}w3"),
            shared_w2=matrix_of(weights, f"{shared}w2"),
            spec=spec,
            ranks=ranks,
        )

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x [n, D], tokens i64 [n] -> [n, D]."""
        chosen, weights = self.gate.route(x, tokens)
        hidden = clamped_swiglu(self.shared_w13.linear(x), limit=self.spec.swiglu_limit)
        shared = self.shared_w2.linear(hidden)
        routed = self.ranks.all_reduce(self.experts.run(x, chosen, weights))  # fp32
        return (routed + shared.float()).to(x.dtype)  # the shared expert is added once
