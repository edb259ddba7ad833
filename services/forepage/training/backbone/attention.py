"""Attention for training: window rows and all compressed rows, one shared key-value head, a sink.

The maths is that of `model/attention.py`. Until the sparse stage, c4 layers attend every entry.
"""

import torch
from torch import Tensor, nn

from forepage.kv.geometry import C4_RATIO
from forepage.model.spec import ModelSpec
from forepage.training.backbone.compressor import Compressor
from forepage.training.backbone.indexer import Indexer
from forepage.training.backbone.maths import fp8_rounded, linear, rms_norm, rotate, unit_rms
from forepage.training.backbone.rows import LayerRows
from forepage.training.backbone.selection import Selection


class Attention(nn.Module):
    """Weights of one layer; `compressor` where it has one, `indexer` where that has ratio 4."""

    def __init__(self, spec: ModelSpec, ratio: int) -> None:
        super().__init__()
        width = spec.num_heads * spec.head_dim
        self.wq_a = nn.Parameter(torch.empty(spec.q_lora_rank, spec.hidden_size))
        self.q_norm = nn.Parameter(torch.empty(spec.q_lora_rank))
        self.wq_b = nn.Parameter(torch.empty(width, spec.q_lora_rank))
        self.wkv = nn.Parameter(torch.empty(spec.head_dim, spec.hidden_size))
        self.kv_norm = nn.Parameter(torch.empty(spec.head_dim))
        self.wo_a = nn.Parameter(torch.empty(spec.o_groups, spec.o_lora_rank, width // spec.o_groups))
        self.wo_b = nn.Parameter(torch.empty(spec.hidden_size, spec.o_groups * spec.o_lora_rank))
        self.sink = nn.Parameter(torch.empty(spec.num_heads))
        self.compressor = Compressor(spec, ratio=ratio, dims=spec.head_dim) if ratio else None
        self.indexer = Indexer(spec) if ratio == C4_RATIO else None
        self._spec = spec

    def read(
        self, x: Tensor, cos: Tensor, sin: Tensor, flattening: Tensor, fp8_share: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x [n, D], rotation [n, rope / 2] -> queries [n, H, d], flattened as asked, and own rows [n, d]."""
        spec = self._spec
        query = linear(self.latent(x), self.wq_b).unflatten(-1, (spec.num_heads, spec.head_dim))
        query = rotate(unit_rms(query, spec.norm_eps), cos.unsqueeze(1), sin.unsqueeze(1))
        own = rotate(rms_norm(linear(x, self.wkv), self.kv_norm, spec.norm_eps).float(), cos, sin)
        own = fp8_rounded(own, spec.rope_dims, fp8_share)
        return (query * flattening[:, None, None]).to(x.dtype), own.to(x.dtype)

    def latent(self, x: Tensor) -> Tensor:
        """The normed low-rank query [n, q_lora], which the indexer reads too."""
        return rms_norm(linear(x, self.wq_a), self.q_norm, self._spec.norm_eps)

    def chosen(self, x: Tensor, rows: LayerRows, selection: Selection) -> Tensor:
        """bool [n, P]: the entries that the indexer of a c4 layer chooses for attention inputs x [n, D]."""
        assert self.indexer is not None
        with torch.no_grad():
            query, weights = self.indexer.ask(x, self.latent(x), (rows.cos, rows.sin))
            return selection.chosen(query, weights, self.indexer.keys(x, rows))

    def written(self, attended: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention [n, H, d] -> [n, D]: turned back at the query's position, two low-rank products."""
        spec = self._spec
        turned = rotate(attended.float(), cos.unsqueeze(1), -sin.unsqueeze(1)).to(attended.dtype)
        grouped = turned.unflatten(1, (spec.o_groups, -1)).flatten(2).transpose(0, 1)  # [G, n, H / G * d]
        low = torch.bmm(grouped, self.wo_a.to(grouped.dtype).transpose(1, 2))  # [G, n, o_lora]
        return linear(low.transpose(0, 1).flatten(1), self.wo_b)
