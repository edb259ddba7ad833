"""Plain torch draw_sorted."""

import torch
from torch import Tensor


def draw_sorted(probs: Tensor, *, top_k: Tensor, top_p: Tensor, min_p: Tensor, target: Tensor) -> Tensor:
    """See the package."""
    rank = torch.arange(probs.shape[-1], device=probs.device)[None, :]
    keep = rank < top_k[:, None]
    keep &= (probs.cumsum(-1) - probs) < top_p[:, None]
    keep &= probs >= min_p[:, None] * probs[:, :1]
    keep &= probs > 0  # what a mask forbids
    keep[:, 0] = True
    cumulative = (probs * keep).cumsum(-1)  # [R, V]
    index = (cumulative <= target[:, None] * cumulative[:, -1:]).sum(-1)  # first column above the target
    return torch.minimum(index, keep.sum(-1) - 1)
