"""Which compressed entries a token attends when it is trained as it is served: the indexer's best, no others.

Scores and choice are made by the ops that serve (`prefill_indexer`, `select_topk`), document by document: so
only entries closed at the token are candidates, ties go to the lower entry, and a document with no more than
`count` entries is attended densely. A choice has no gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from forepage.kv.geometry import C4_RATIO
from forepage.training.backbone.packing import Packing
from forepage_kernels.prefill_indexer import prefill_indexer
from forepage_kernels.select_topk import select_topk

TILE_SCORES = 1 << 26
"""Scores [tokens, N] held at once: 256 MB."""


@dataclass(frozen=True)
class Selection:
    """The best `count` entries of each token of what `packing` holds."""

    packing: Packing
    count: int

    @torch.no_grad()
    def chosen(self, query: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
        """What `Indexer.ask` gives of n tokens, f32 [n, H, D] and [n, H], keys [n / 4, D] -> bool [n, P]."""
        packing = self.packing
        chosen = torch.zeros(packing.num_tokens, packing.places, dtype=torch.bool, device=keys.device)
        begin = 0
        for length in packing.lengths:
            entries = slice(begin // C4_RATIO, (begin + length) // C4_RATIO)
            tile = max(1, TILE_SCORES // (length // C4_RATIO))
            for first in range(0, length, tile):
                part = slice(begin + first, begin + min(first + tile, length))
                scores = prefill_indexer(
                    query[part], weights[part], keys[entries], start=first, ratio=C4_RATIO
                )
                chosen[part, entries] = best_entries(scores, self.count)
            begin += length
        return chosen

    def visible(self, chosen: Tensor) -> BlockMask | Tensor:
        """The rows that each token sees: window and chosen entries; for `rows.attend`."""
        return self.packing.narrowed(C4_RATIO, chosen)


def best_entries(scores: Tensor, count: int) -> Tensor:
    """bool [T, N]: the `count` best of f32 [T, N] above -inf, as `select_topk` takes them."""
    selected = select_topk(scores, count)  # i64 [T, k], -1 where there is none
    num_tokens, num_entries = scores.shape
    places = torch.where(selected < 0, num_entries, selected)
    best = torch.zeros(num_tokens, num_entries + 1, dtype=torch.bool, device=scores.device)
    return best.scatter_(1, places, True)[:, :num_entries]
