"""Mixture of experts for training: all experts on all tokens, as two plain matrix products.

With few experts that costs less than sorting tokens. An unchosen expert's share is 0, so it gets no gradient.
The maths is that of `model/moe.py`; the routing weight is applied before w2: the same in exact arithmetic.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forepage.model.spec import ModelSpec
from forepage.training.backbone.maths import linear

MIN_WEIGHT_SUM = 1e-20
UNFORCED = -1.0


class Experts(nn.Module):
    """w13 [E + 1, 2, M, D] (gate and up), w2 [E + 1, M, D] (transposed); the shared expert is the last.

    Hash layers route by `expert_ids` i64 [vocab, k], others by scores with the selection-only `bias` [E];
    each kind leaves the other's buffer unused.
    """

    bias: Tensor
    expert_ids: Tensor

    def __init__(self, spec: ModelSpec, *, hashed: bool) -> None:
        super().__init__()
        experts, size = spec.num_experts + 1, spec.expert_size
        self.gate = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))
        self.w13 = nn.Parameter(torch.empty(experts, 2, size, spec.hidden_size))
        self.w2 = nn.Parameter(torch.empty(experts, size, spec.hidden_size))
        shape = (spec.vocab_size, spec.experts_per_token)
        self.register_buffer("expert_ids", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("bias", torch.zeros(spec.num_experts))
        self.hashed = hashed
        self._spec = spec

    def forced(self, tokens: Tensor) -> Tensor:
        """f32 [n, E]: hash layers' choice, 0 or 1; UNFORCED where scores decide."""
        shape = (tokens.shape[0], self._spec.num_experts)
        if not self.hashed:
            return torch.full((), UNFORCED, device=tokens.device).expand(shape).contiguous()
        ids = torch.arange(self._spec.num_experts, device=tokens.device)
        return (self.expert_ids[tokens].unsqueeze(-1) == ids).any(1).float()

    def forward(self, x: Tensor, forced: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, D], forced as above, selection bias [E] -> output [n, D], share of choices f32 [E].

        Hash layers take part in the same code as others, so that it is compiled once.
        """
        spec = self._spec
        scores = F.softplus(F.linear(x.float(), self.gate)).sqrt()  # [n, E]
        ranked = best(scores.detach() + bias, spec.experts_per_token)
        chosen = torch.where(forced == UNFORCED, ranked, forced)
        picked = scores * chosen
        shares = picked / (picked.sum(-1, keepdim=True) + MIN_WEIGHT_SUM) * spec.routed_scale
        shares = torch.cat((shares, torch.ones_like(shares[:, :1])), dim=1)  # [n, E + 1]
        hidden = linear(x, self.w13.flatten(0, 2)).float().unflatten(-1, (-1, 2, spec.expert_size))
        gate, up = hidden[:, :, 0].clamp(max=spec.swiglu_limit), hidden[:, :, 1]
        hidden = F.silu(gate) * up.clamp(-spec.swiglu_limit, spec.swiglu_limit) * shares.unsqueeze(-1)
        output = hidden.flatten(1).to(x.dtype) @ self.w2.flatten(0, 1).to(x.dtype)
        return output, chosen.mean(0) / spec.experts_per_token


def best(scores: Tensor, count: int) -> Tensor:
    """f32 [n, E]: 1 for the `count` best, ties to the lower id; by counting who is ahead, which fuses."""
    ids = torch.arange(scores.shape[1], device=scores.device)
    mine, other = scores.unsqueeze(-1), scores.unsqueeze(-2)  # [n, E, 1], [n, 1, E]
    ahead = (other > mine) | ((other == mine) & (ids < ids.unsqueeze(-1)))
    return (ahead.sum(-1) < count).float()
