"""Lightning Indexer: scores every compressed entry for a token and keeps the best `index_topk`.

Score of entry w = sum over heads of a_h * relu(q_h . k_w), with signed head weights a. Keys come from an
own compressor (ratio 4) and live in the key pool. Quantised keys are stored Hadamard-rotated, so queries are
rotated too; the rotation is orthonormal and leaves scores unchanged. With mxfp4 keys queries are rounded to
FP4 as well: both sides then hold what the reference's QAT simulation computes with. With fp8 keys they are
rounded to bf16, which no reference does: scores are nearer to the unquantised model's than the reference's
are, and every product of a stored key and a query is exact wherever it is computed.
Source: DeepSeek-V4 Indexer. Ties go to the lower entry, in decode and prefill alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from forepage.kv.geometry import C4_RATIO
from forepage.model.compressor import Compressor
from forepage.model.rope import Rotation
from forepage.model.spec import ModelSpec
from forepage.model.weight_matrix import WeightMatrix, matrix_of
from forepage_kernels.layout import KeyLayout, KeyPool
from forepage_kernels.mxfp4 import simulate_mxfp4
from forepage_kernels.native_indexer import native_indexer
from forepage_kernels.prefill_indexer import prefill_indexer
from forepage_kernels.row_turn import hadamard
from forepage_kernels.select_topk import select_topk
from forepage_kernels.unpack_rows import unpack_rows

PREFILL_SCORES = 1 << 26
"""Scores [tokens, N] held at once in prefill, 256 MB; longer chunks are scored in tiles of tokens."""


@dataclass(frozen=True)
class IndexerQuery:
    """What a token asks: query f32 [n, H, D] as scored against stored keys, head weights f32 [n, H]."""

    query: Tensor
    weights: Tensor


@dataclass(frozen=True)
class IndexerTap:
    """A token's query and what it selected: entries ascending, padded with -1 (score -inf)."""

    query: Tensor  # f32 [B, H, D]
    weights: Tensor  # f32 [B, H]
    selected: Tensor  # i64 [B, index_topk]
    scores: Tensor  # f32 [B, index_topk]

    def last(self) -> "IndexerTap":
        """The last token's tap alone."""
        return IndexerTap(self.query[-1:], self.weights[-1:], self.selected[-1:], self.scores[-1:])

    def chosen(self, row: int) -> tuple[Tensor, Tensor]:
        """What one token selected, without padding, on the CPU: entries i64 [n], scores f32 [n]."""
        entries, scores = self.selected[row].cpu(), self.scores[row].cpu()
        return entries[entries >= 0], scores[entries >= 0]


@dataclass(frozen=True)
class Indexer:
    """One c4 layer's indexer: wq_b [H * D, q_lora], w_heads [H, hidden]."""

    wq_b: WeightMatrix
    w_heads: Tensor
    compressor: Compressor
    spec: ModelSpec

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor], prefix: str, spec: ModelSpec) -> "Indexer":
        """Read `{prefix}wq_b`, `weights_proj` and `compressor.*`."""
        return cls(
            wq_b=matrix_of(weights, f"{prefix}wq_b"),
            w_heads=weights[f"{prefix}weights_proj.weight"],
            compressor=Compressor.from_weights(weights, f"{prefix}compressor.", C4_RATIO, spec),
            spec=spec,
        )

    def query(self, x: Tensor, q_latent: Tensor, rope: Rotation, *, keys: KeyLayout) -> IndexerQuery:
        """x [n, hidden], q_latent [n, q_lora] (the attention's, after its norm); to score `keys` with."""
        heads, dims = self.spec.index_heads, self.spec.index_dims
        query = self.wq_b.linear(q_latent).float().view(-1, heads, dims)  # [n, H, D]
        query = rope.per_head().apply(query)
        scale = dims**-0.5 * heads**-0.5
        weights = F.linear(x, self.w_heads).float() * scale  # [n, H]
        if keys.rotated:
            query = hadamard(query)
        if keys.format == "mxfp4":
            query = simulate_mxfp4(query)
        elif keys.rotated:
            query = query.bfloat16().float()
        return IndexerQuery(query, weights)

    def select(self, ask: IndexerQuery, pool: KeyPool, *, block_table: Tensor, visible: Tensor) -> IndexerTap:
        """Top entries of B sequences among those whose key block is resident: tables [B, M], visible [B]."""
        scores = native_indexer(ask.query, ask.weights, pool, block_table=block_table, visible=visible)
        return self._tap(ask, scores)

    def select_prefill(self, ask: IndexerQuery, pool: KeyPool, *, slots: Tensor, start: int) -> IndexerTap:
        """Top entries of each of S consecutive tokens from `start` on, all N keys given by slots i64 [N]."""
        keys = unpack_rows(pool, slots, torch.bfloat16 if pool.layout.rotated else torch.float32)  # [N, D]
        tile = max(1, PREFILL_SCORES // max(1, keys.shape[0]))
        taps = []
        for first in range(0, ask.query.shape[0], tile):
            part = IndexerQuery(ask.query[first : first + tile], ask.weights[first : first + tile])
            at = start + first
            scores = prefill_indexer(part.query, part.weights, keys, start=at, ratio=C4_RATIO)  # [T, N]
            taps.append(self._tap(part, scores))
        return IndexerTap(
            query=ask.query,
            weights=ask.weights,
            selected=torch.cat([tap.selected for tap in taps]),
            scores=torch.cat([tap.scores for tap in taps]),
        )

    def _tap(self, ask: IndexerQuery, scores: Tensor) -> IndexerTap:
        selected = select_topk(scores, self.spec.index_topk)  # [n, k]
        picked = (
            scores.gather(1, selected.clamp(min=0)) if scores.shape[1] else scores.new_zeros(selected.shape)
        )
        return IndexerTap(
            query=ask.query,
            weights=ask.weights,
            selected=selected,
            scores=picked.masked_fill(selected < 0, float("-inf")),
        )
