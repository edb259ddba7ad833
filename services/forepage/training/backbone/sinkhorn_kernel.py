# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton kernels of `sinkhorn`: a thread holds a token's whole matrix, so no step leaves the registers.

Matrices are 4 x 4: hyper-connections of this model family have four streams.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from forepage_kernels.jit import jit, on_device_of

TOKENS = 128
"""Tokens a program takes: one a thread."""


def forward(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """f32 [n, 4, 4] -> the same shape, columns summing to 1."""
    logits = logits.contiguous()
    result = torch.empty_like(logits)
    count = logits.shape[0]
    grid = (triton.cdiv(count, TOKENS),)
    with on_device_of(logits):
        _forward[grid](logits, result, count, eps, ITERATIONS=iterations, TOKENS=TOKENS)
    return result


def backward(logits: Tensor, gradient: Tensor, iterations: int, eps: float) -> Tensor:
    """The logits' gradient."""
    logits, gradient = logits.contiguous(), gradient.contiguous()
    result = torch.empty_like(logits)
    count = logits.shape[0]
    grid = (triton.cdiv(count, TOKENS),)
    with on_device_of(logits):
        _backward[grid](logits, gradient, result, count, eps, ITERATIONS=iterations, TOKENS=TOKENS)
    return result


@jit
def _load(pointer: tl.tensor, place: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """A [T, 4, 4] tile."""
    row = tl.arange(0, 4)[None, :, None]
    column = tl.arange(0, 4)[None, None, :]
    return tl.load(
        pointer + place[:, None, None] * 16 + row * 4 + column, mask=mask[:, None, None], other=0.0
    )


@jit
def _store(pointer: tl.tensor, place: tl.tensor, mask: tl.tensor, tile: tl.tensor) -> None:
    row = tl.arange(0, 4)[None, :, None]
    column = tl.arange(0, 4)[None, None, :]
    tl.store(pointer + place[:, None, None] * 16 + row * 4 + column, tile, mask=mask[:, None, None])


@jit
def _softmax(tile: tl.tensor) -> tl.tensor:
    weights = tl.exp(tile - tl.max(tile, axis=2, keep_dims=True))
    return weights / tl.sum(weights, axis=2, keep_dims=True)


@jit
def _forward(
    logits: tl.tensor,
    result: tl.tensor,
    count: tl.tensor,
    eps: tl.tensor,
    ITERATIONS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    place = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    mask = place < count
    comb = _softmax(_load(logits, place, mask)) + eps
    comb = comb / (tl.sum(comb, axis=1, keep_dims=True) + eps)
    for _ in tl.static_range(ITERATIONS - 1):
        comb = comb / (tl.sum(comb, axis=2, keep_dims=True) + eps)
        comb = comb / (tl.sum(comb, axis=1, keep_dims=True) + eps)
    _store(result, place, mask, comb)


@jit
def _backward(
    logits: tl.tensor,
    gradient: tl.tensor,
    result: tl.tensor,
    count: tl.tensor,
    eps: tl.tensor,
    ITERATIONS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """y = x / s, s = sum x + eps, has the gradient dx = (dy - sum(dy * y)) / s; and x = y * s."""
    place = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    mask = place < count
    soft = _softmax(_load(logits, place, mask))
    grad = _load(gradient, place, mask)
    comb = soft + eps
    first = tl.sum(comb, axis=1, keep_dims=True) + eps
    comb = comb / first
    sums = (first,)
    for _ in tl.static_range(ITERATIONS - 1):
        rows = tl.sum(comb, axis=2, keep_dims=True) + eps
        comb = comb / rows
        columns = tl.sum(comb, axis=1, keep_dims=True) + eps
        comb = comb / columns
        sums = sums + (rows, columns)  # type: ignore[assignment]  # noqa: RUF005 (Triton unpacks no tuples)
    for step in tl.static_range(ITERATIONS - 1):
        columns = sums[2 * (ITERATIONS - 1) - 2 * step]
        grad = (grad - tl.sum(grad * comb, axis=1, keep_dims=True)) / columns
        comb = comb * columns
        rows = sums[2 * (ITERATIONS - 1) - 2 * step - 1]
        grad = (grad - tl.sum(grad * comb, axis=2, keep_dims=True)) / rows
        comb = comb * rows
    grad = (grad - tl.sum(grad * comb, axis=1, keep_dims=True)) / first
    _store(result, place, mask, soft * (grad - tl.sum(grad * soft, axis=2, keep_dims=True)))
