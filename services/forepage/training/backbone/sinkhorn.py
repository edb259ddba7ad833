"""Sinkhorn balancing of small square matrices, with its gradient: one kernel each way on a GPU.

Twenty normalisations of a 4 x 4 matrix are some 640 divisions a token and site: nothing, if they stay in
registers. So a custom operator hides them from the compiler, which would make dozens of kernels of them.
The backward runs the forward again, keeps every sum, and undoes one normalisation after the other.
"""

import torch
from torch import Tensor, library

from forepage.training.backbone import sinkhorn_kernel


@library.custom_op("forepage::sinkhorn", mutates_args=())
def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Row softmax of f32 [n, S, S], then columns and rows scaled to sum to 1 in turn, columns last.

    The same steps as `model/hyper_connections.py`: columns first, then `iterations - 1` times both.
    """
    if logits.is_cuda:
        return sinkhorn_kernel.forward(logits, iterations, eps)
    return _reference(logits, iterations, eps)


@sinkhorn.register_fake
def _(logits: Tensor, iterations: int, eps: float) -> Tensor:
    del iterations, eps
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@library.custom_op("forepage::sinkhorn_backward", mutates_args=())
def sinkhorn_backward(logits: Tensor, gradient: Tensor, iterations: int, eps: float) -> Tensor:
    """Gradient of the logits, from that of the result: all f32 [n, S, S]."""
    if logits.is_cuda:
        return sinkhorn_kernel.backward(logits, gradient, iterations, eps)
    return _reference_backward(logits, gradient, iterations, eps)


@sinkhorn_backward.register_fake
def _(logits: Tensor, gradient: Tensor, iterations: int, eps: float) -> Tensor:
    del gradient, iterations, eps
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _axes(iterations: int) -> list[int]:
    """Along what each normalisation sums."""
    return [-2, *[-1, -2] * (iterations - 1)]


def _reference(logits: Tensor, iterations: int, eps: float) -> Tensor:
    comb = torch.softmax(logits, dim=-1) + eps
    for axis in _axes(iterations):
        comb = comb / (comb.sum(axis, keepdim=True) + eps)
    return comb


def _reference_backward(logits: Tensor, gradient: Tensor, iterations: int, eps: float) -> Tensor:
    """y = x / s with s = sum x + eps has dx = (dy - sum(dy * y)) / s, and x = y * s."""
    soft = torch.softmax(logits, dim=-1)
    comb, sums = soft + eps, []
    for axis in _axes(iterations):
        sums.append(comb.sum(axis, keepdim=True) + eps)
        comb = comb / sums[-1]
    for axis, total in zip(reversed(_axes(iterations)), reversed(sums), strict=True):
        gradient = (gradient - (gradient * comb).sum(axis, keepdim=True)) / total
        comb = comb * total
    return soft * (gradient - (gradient * soft).sum(-1, keepdim=True))


def _save(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, int, float], output: Tensor
) -> None:
    del output
    logits, ctx.iterations, ctx.eps = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(logits)


def _gradient(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
    (logits,) = ctx.saved_tensors  # type: ignore[attr-defined]
    back = sinkhorn_backward(logits, gradient.contiguous(), ctx.iterations, ctx.eps)  # type: ignore[attr-defined]
    return back, None, None


sinkhorn.register_autograd(_gradient, setup_context=_save)
