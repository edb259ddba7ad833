"""Prefill attention: one key-value head shared by all query heads, masked, with a sink.

Rows are both keys and values. The sink adds to the softmax denominator only. fp32 throughout.
"""

import torch
from torch import Tensor

MAX_TILE_TOKENS = 128
TILE_SCORES = 1 << 24
"""Scores [tokens, H, rows] held at once."""


def tile_tokens(num_heads: int, num_rows: int) -> int:
    """How many query tokens to attend at once over so many rows."""
    return max(1, min(MAX_TILE_TOKENS, TILE_SCORES // (num_heads * max(1, num_rows))))


def attend_masked(q: Tensor, rows: Tensor, mask: Tensor, sinks: Tensor, *, scale: float) -> Tensor:
    """Attend the rows a token's mask allows, at least one: f32 [T, H, d].

    Shapes: q [T, H, d], rows f32 [N, d], mask bool [T, N], sinks f32 [H].
    """
    num_tokens, num_heads, dims = q.shape
    scores = (q.float().reshape(-1, dims) * scale) @ rows.T  # [T * H, N]
    scores = scores.view(num_tokens, num_heads, -1).masked_fill_(~mask.unsqueeze(1), float("-inf"))
    top = scores.amax(-1, keepdim=True)  # [T, H, 1]
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True) + torch.exp(sinks.view(1, -1, 1) - top)
    out = weights.view(num_tokens * num_heads, -1) @ rows  # [T * H, d]
    return out.view(num_tokens, num_heads, dims) / total


def window_mask(start: int, end: int, oldest: int, window_tokens: int, *, device: torch.device) -> Tensor:
    """Which of tokens oldest..end-1 each query start..end-1 sees, itself included: bool [T, N]."""
    queries = torch.arange(start, end, device=device).unsqueeze(1)
    age = queries - torch.arange(oldest, end, device=device)
    return (age >= 0) & (age < window_tokens)


def closed_mask(start: int, end: int, ratio: int, *, device: torch.device) -> Tensor:
    """Which compressed entries are closed for each query start..end-1: bool [T, end // ratio]."""
    closed = (torch.arange(start, end, device=device) + 1) // ratio
    return torch.arange(end // ratio, device=device) < closed.unsqueeze(1)


def selection_mask(selected: Tensor, num_entries: int) -> Tensor:
    """selected i64 [T, k] below num_entries, negative = none -> bool [T, num_entries]."""
    mask = torch.zeros(selected.shape[0], num_entries + 1, dtype=torch.bool, device=selected.device)
    return mask.scatter_(1, torch.where(selected >= 0, selected, num_entries), True)[:, :num_entries]
