# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton row_norm: a program norms some rows, each read once."""

import torch
import triton.language as tl
from torch import Tensor

from forepage_kernels.jit import jit, next_power_of_2, on_device_of

ELEMENTS = 2048
"""Of a program: short rows are taken several at a time."""


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """See the package; no weight: all ones. The result is contiguous."""
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    dims = x.shape[-1]
    if out.numel():
        rows, block = x.numel() // dims, next_power_of_2(dims)
        together = max(1, ELEMENTS // block)
        with on_device_of(x):
            norm[(-(-rows // together),)](
                x,
                x if weight is None else weight,
                out,
                rows,
                eps,
                DIMS=dims,
                BLOCK_D=block,
                ROWS=together,
                HAS_WEIGHT=weight is not None,
                num_warps=4 if together * block <= ELEMENTS else 8,
            )
    return out


@jit
def norm(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    DIMS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
) -> None:
    """x and out [rows, DIMS], weight [DIMS] if it is read."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (dim < DIMS)[None, :]
    place = row[:, None] * DIMS + dim[None, :]
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)  # [ROWS, D]
    mean = tl.sum(values * values, axis=1) / DIMS
    result = values * tl.rsqrt(mean + eps)[:, None]
    if HAS_WEIGHT:
        result = result * tl.load(weight + dim, mask=dim < DIMS, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)
