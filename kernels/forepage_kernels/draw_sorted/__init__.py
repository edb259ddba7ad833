"""Draws from probabilities that are sorted: the inverse of their cumulative distribution, cut short."""

import torch
from torch import Tensor

from forepage_kernels.checks import check_tensor
from forepage_kernels.draw_sorted import reference


def draw_sorted(probs: Tensor, *, top_k: Tensor, top_p: Tensor, min_p: Tensor, target: Tensor) -> Tensor:
    """Which column each row draws with its number `target` in [0, 1).

    Shapes: probs f64 [R, V], falling along each row, the others f64 [R] -> i64 [R]. Kept are the first one,
    and columns before `top_k` whose sum of earlier ones is below `top_p`, that are at least `min_p` times the
    first, and not 0. A row's result depends on nothing but the row, on every launch.
    """
    rows = probs.shape[0]
    check_tensor("probs", probs, dtype=torch.float64, shape=[None, None])
    for name, value in (("top_k", top_k), ("top_p", top_p), ("min_p", min_p), ("target", target)):
        check_tensor(name, value.contiguous(), dtype=torch.float64, shape=[rows], device=probs.device)
    if probs.is_cuda:
        from forepage_kernels.draw_sorted.kernel import draw_sorted as draw
    else:
        draw = reference.draw_sorted
    return draw(probs, top_k=top_k, top_p=top_p, min_p=min_p, target=target)
