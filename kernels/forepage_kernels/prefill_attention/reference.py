"""Plain torch prefill_attention: dense with a mask, some tokens at a time. fp32 throughout."""

import torch
from torch import Tensor

MAX_TILE_TOKENS = 128
TILE_SCORES = 1 << 24
"""Scores [tokens, H, rows] held at once."""


def prefill_attention(
    q: Tensor,
    rows: Tensor,
    selected: Tensor | None,
    window: Tensor,
    sinks: Tensor,
    *,
    start: int,
    ratio: int,
    window_tokens: int,
    softmax_scale: float,
) -> Tensor:
    """See the package."""
    out = torch.empty_like(q)
    num_tokens, num_heads, _ = q.shape
    first_row = start - (window.shape[0] - num_tokens)  # token of window[0]
    tile = _tile_tokens(num_heads, window_tokens + rows.shape[0])
    for first in range(0, num_tokens, tile):
        last = min(first + tile, num_tokens)
        begin, end = start + first, start + last
        oldest = max(begin - window_tokens + 1, first_row)
        num_closed = min(end // ratio, rows.shape[0])
        mask = closed_mask(begin, end, ratio, device=q.device)[:, :num_closed]
        if selected is not None:
            mask = mask & selection_mask(selected[first:last], num_closed)
        seen = torch.cat((rows[:num_closed], window[oldest - first_row : end - first_row])).float()
        mask = torch.cat((mask, window_mask(begin, end, oldest, window_tokens, device=q.device)), dim=1)
        out[first:last] = attend_masked(q[first:last], seen, mask, sinks, scale=softmax_scale)
    return out


def _tile_tokens(num_heads: int, num_rows: int) -> int:
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
    """selected i64 [T, k], below 0 or from num_entries on: none -> bool [T, num_entries]."""
    mask = torch.zeros(selected.shape[0], num_entries + 1, dtype=torch.bool, device=selected.device)
    is_entry = (selected >= 0) & (selected < num_entries)
    return mask.scatter_(1, torch.where(is_entry, selected, num_entries), True)[:, :num_entries]
