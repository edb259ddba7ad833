"""The Lightning Indexer for training: scores of entries for some tokens, and what it learns from.

The maths is that of `model/indexer.py`, without the quantised keys' Hadamard rotation, which leaves scores
unchanged. Its inputs are detached: it never pulls on the backbone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forepage.kv.geometry import C4_RATIO
from forepage.model.spec import ModelSpec
from forepage.training.backbone.compressor import Compressor
from forepage.training.backbone.maths import linear, rotate
from forepage.training.backbone.rows import LayerRows


class Indexer(nn.Module):
    """wq_b [H * D, q_lora], weights_proj [H, hidden], and a compressor of its own."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.wq_b = nn.Parameter(torch.empty(spec.index_heads * spec.index_dims, spec.q_lora_rank))
        self.weights_proj = nn.Parameter(torch.empty(spec.index_heads, spec.hidden_size))
        self.compressor = Compressor(spec, ratio=C4_RATIO, dims=spec.index_dims)
        self._spec = spec

    def keys(self, x: Tensor, rows: LayerRows) -> Tensor:
        """Attention inputs x [n, D] -> keys [n / 4, D_i] in the dtype of x."""
        entries: Tensor = self.compressor(x.detach(), rows.entry_cos, rows.entry_sin, rows.first_entries)
        return entries.to(x.dtype)

    def ask(self, x: Tensor, latent: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """x [R, D] and latent [R, q_lora] of some tokens, their rotation [R, rope / 2]: query, head weights.

        f32 [R, H, D_i] and f32 [R, H].
        """
        spec = self._spec
        query = linear(latent.detach(), self.wq_b).float().unflatten(-1, (spec.index_heads, spec.index_dims))
        query = rotate(query, rope[0].unsqueeze(1), rope[1].unsqueeze(1))
        weights = linear(x.detach(), self.weights_proj).float() * (spec.index_dims * spec.index_heads) ** -0.5
        return query, weights

    def scores(self, x: Tensor, latent: Tensor, keys: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """As `ask`, against keys [N, D_i] -> f32 [R, N]."""
        query, weights = self.ask(x, latent, rope)
        query = query.to(x.dtype)
        total = torch.zeros(x.shape[0], keys.shape[0], device=x.device)
        for head in range(self._spec.index_heads):
            total = total + weights[:, head, None] * F.relu((query[:, head] @ keys.T).float())
        return total
