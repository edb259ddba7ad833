"""Plain torch prefill_indexer: two matrix products, some tokens at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_SCORES = 1 << 24
"""Head scores [tokens, H, N] held at once."""


def prefill_indexer(q: Tensor, weights: Tensor, keys: Tensor, *, start: int, ratio: int) -> Tensor:
    """See the package."""
    (num_tokens, num_heads), num_entries = weights.shape, keys.shape[0]
    scores = q.new_empty(num_tokens, num_entries)
    if num_entries == 0:
        return scores
    asked, entries = q.to(keys.dtype).float(), keys.float()
    tile = max(1, TILE_SCORES // (num_heads * num_entries))
    for first in range(0, num_tokens, tile):
        part = slice(first, min(first + tile, num_tokens))
        dots = F.relu(torch.matmul(asked[part].flatten(0, 1), entries.T), inplace=True)  # [T * H, N]
        dots = dots.view(-1, num_heads, num_entries)
        scores[part] = torch.bmm(weights[part].unsqueeze(1), dots).squeeze(1)  # [T, N]
    closed = (torch.arange(start, start + num_tokens, device=q.device) + 1) // ratio  # [T]
    future = torch.arange(num_entries, device=q.device) >= closed.unsqueeze(1)
    return scores.masked_fill_(future, float("-inf"))
