# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton row_turn: a program turns one row (a head of a token)."""

import torch
import triton.language as tl
from torch import Tensor

from forepage_kernels.compress_quantize.kernel import hadamard as butterflies
from forepage_kernels.errors import ShapeError
from forepage_kernels.jit import jit, next_power_of_2, on_device_of


def turn_pairs(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """See the package. The result is contiguous."""
    x = x.contiguous()
    out = torch.empty_like(x)
    dims = x.shape[-1]
    if out.numel():
        rows = x.numel() // dims
        with on_device_of(x):
            turn_row[(rows,)](
                x,
                cos,
                sin,
                out,
                rows * cos.shape[-1] // cos.numel(),
                DIMS=dims,
                ROPE=2 * cos.shape[-1],
                BLOCK_D=max(2, next_power_of_2(dims)),
                INVERSE=inverse,
                num_warps=1,
            )
    return out


def hadamard(x: Tensor) -> Tensor:
    """See the package. The result is contiguous."""
    x = x.contiguous()
    dims = x.shape[-1]
    if dims & (dims - 1) or dims == 0:
        raise ShapeError(f"hadamard: {dims} dims is no power of two")
    out = torch.empty_like(x)
    if out.numel():
        with on_device_of(x):
            transform[(x.numel() // dims,)](x, out, float(dims**-0.5), DIMS=dims, num_warps=1)
    return out


@jit
def turn_row(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    rows_each: tl.tensor,
    DIMS: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INVERSE: tl.constexpr,
) -> None:
    """x and out [rows, DIMS], cos and sin [rows / rows_each, ROPE / 2]."""
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    values = tl.load(x + row * DIMS + dim, mask=dim < DIMS, other=0.0).to(tl.float32)
    angle = row // rows_each * (ROPE // 2)
    turned = turn_by(values, cos + angle, sin + angle, DIMS, ROPE, BLOCK_D, INVERSE)
    tl.store(out + row * DIMS + dim, turned.to(out.dtype.element_ty), mask=dim < DIMS)


@jit
def turn_by(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    DIMS: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INVERSE: tl.constexpr,
) -> tl.tensor:
    """RoPE on the interleaved pairs of the trailing ROPE of DIMS dims; cos, sin point at [ROPE / 2]."""
    pair = tl.arange(0, BLOCK_D // 2) - (DIMS - ROPE) // 2
    turned = (pair >= 0) & (pair < ROPE // 2)
    c = tl.load(cos + pair, mask=turned, other=1.0)
    s = tl.load(sin + pair, mask=turned, other=0.0)
    if INVERSE:
        s = -s
    even, odd = tl.split(tl.reshape(x, [BLOCK_D // 2, 2]))
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [BLOCK_D])


@jit
def transform(x: tl.tensor, out: tl.tensor, scale: tl.tensor, DIMS: tl.constexpr) -> None:
    """One row of x [rows, DIMS], the additions in layout.hadamard's order."""
    row = tl.program_id(0).to(tl.int64) * DIMS + tl.arange(0, DIMS)
    tl.store(out + row, butterflies(tl.load(x + row), DIMS) * scale)
