"""Plain torch sparse_decode: decode the rows of both lists, one masked softmax."""

import torch
from torch import Tensor

from forepage_kernels.layout import RowPool, load_rows


def sparse_decode(
    q: Tensor,
    compressed: RowPool | None,
    compressed_slots: Tensor,
    window: RowPool,
    window_slots: Tensor,
    sinks: Tensor,
    *,
    softmax_scale: float,
) -> Tensor:
    """See the package."""
    rows = load_rows(window, window_slots)  # [B, W, d]
    slots = window_slots
    if compressed is not None:
        rows = torch.cat((load_rows(compressed, compressed_slots), rows), dim=1)  # [B, K + W, d]
        slots = torch.cat((compressed_slots, window_slots), dim=1)
    if rows.shape[1] == 0:
        return torch.zeros_like(q)
    absent = (slots < 0).unsqueeze(1)  # [B, 1, K + W]
    scores = (q.float() @ rows.mT * softmax_scale).masked_fill(absent, float("-inf"))  # [B, H, K + W]
    top = scores.amax(dim=2, keepdim=True)
    top = torch.where(top.isneginf(), 0.0, top)  # no row at all
    p = torch.exp(scores - top)
    sink = torch.exp(sinks.view(1, -1, 1) - top)
    return (p @ rows / (p.sum(dim=2, keepdim=True) + sink)).to(q.dtype)
