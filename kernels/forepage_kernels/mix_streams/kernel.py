# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton mix_streams: a program a token collapses, a program a (token, tile of dims) expands.

A collapse holds the token's streams in registers, so they are read once; its S x S matrix is balanced there
too, which as separate kernels was most of a decode step's launches.
"""

from typing import TYPE_CHECKING

import torch
import triton.language as tl
from torch import Tensor

from forepage_kernels.jit import jit, jit_unspecialised, next_power_of_2, on_device_of

if TYPE_CHECKING:
    from forepage_kernels.mix_streams import MixParameters

EXPAND_DIMS = 512
ELEMENTS_PER_WARP = 2048
"""Of a token's streams: 64 fp32 registers a thread."""


def collapse_streams(
    streams: Tensor, projected: Tensor, norm_weight: Tensor | None, how: "MixParameters"
) -> tuple[Tensor, Tensor, Tensor]:
    """See the package."""
    num_tokens, num_streams, dims = streams.shape
    x = torch.empty(num_tokens, dims, dtype=streams.dtype, device=streams.device)
    post = torch.empty(num_tokens, num_streams, device=streams.device)
    comb = torch.empty(num_tokens, num_streams, num_streams, device=streams.device)
    block = next_power_of_2(dims)
    if num_tokens:
        with on_device_of(streams):
            collapse[(num_tokens,)](
                streams,
                projected,
                how.base,
                how.scale,
                how.base if norm_weight is None else norm_weight,
                x,
                post,
                comb,
                how.eps,
                how.norm_eps,
                how.iterations,
                num_tokens,
                STREAMS=num_streams,
                DIMS=dims,
                PARTS=projected.shape[0],
                BLOCK_P=next_power_of_2(projected.shape[0]),
                IS_NORMED=norm_weight is not None,
                BLOCK_D=block,
                num_warps=min(16, max(1, num_streams * block // ELEMENTS_PER_WARP)),
            )
    return x, post, comb


def expand_streams(output: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """See the package."""
    num_tokens, num_streams, dims = streams.shape
    expanded = torch.empty_like(streams)
    if num_tokens:
        with on_device_of(streams):
            expand[(num_tokens, -(-dims // EXPAND_DIMS))](
                output,
                streams,
                post,
                comb,
                expanded,
                STREAMS=num_streams,
                DIMS=dims,
                BLOCK_D=min(EXPAND_DIMS, next_power_of_2(dims)),
                num_warps=2,
            )
    return expanded


@jit_unspecialised("num_tokens")
def collapse(
    streams: tl.tensor,
    projected: tl.tensor,
    base: tl.tensor,
    scale: tl.tensor,
    norm_weight: tl.tensor,
    x: tl.tensor,
    post: tl.tensor,
    comb: tl.tensor,
    eps: tl.tensor,
    norm_eps: tl.tensor,
    iterations: tl.tensor,
    num_tokens: tl.tensor,
    STREAMS: tl.constexpr,
    DIMS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    IS_NORMED: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Shapes as in the package; without a norm `norm_weight` is not read."""
    token = tl.program_id(0).to(tl.int64)
    stream, dim = tl.arange(0, STREAMS), tl.arange(0, BLOCK_D)
    inside = dim < DIMS
    place = streams + token * (STREAMS * DIMS) + stream[:, None] * DIMS + dim[None, :]
    values = tl.load(place, mask=inside[None, :], other=0.0).to(tl.float32)  # [S, D]
    square_sum = tl.sum(tl.sum(values * values, axis=1), axis=0)
    inverse_rms = tl.rsqrt(square_sum / (STREAMS * DIMS) + norm_eps)

    mixed = projected + token * ((2 + STREAMS) * STREAMS)
    step = num_tokens.to(tl.int64) * ((2 + STREAMS) * STREAMS)
    cell = stream[:, None] * STREAMS + stream[None, :]  # [S, S]
    # All parts are asked for at once: one after another they would take longer than all the rest.
    part = tl.arange(0, BLOCK_P)
    rows, is_part = (mixed + part * step)[:, None] + stream[None, :], (part < PARTS)[:, None]  # [P, S]
    cells = (mixed + part * step)[:, None, None] + 2 * STREAMS + cell[None, :, :]  # [P, S, S]
    pre_x = tl.sum(tl.load(rows, mask=is_part, other=0.0), axis=0) * inverse_rms
    post_x = tl.sum(tl.load(rows + STREAMS, mask=is_part, other=0.0), axis=0) * inverse_rms
    comb_x = tl.sum(tl.load(cells, mask=is_part[:, :, None], other=0.0), axis=0) * inverse_rms
    pre = tl.sigmoid(pre_x * tl.load(scale) + tl.load(base + stream)) + eps  # [S]
    post_b = tl.load(base + STREAMS + stream)
    tl.store(post + token * STREAMS + stream, 2.0 * tl.sigmoid(post_x * tl.load(scale + 1) + post_b))
    logits = comb_x * tl.load(scale + 2) + tl.load(base + 2 * STREAMS + cell)
    tl.store(comb + token * (STREAMS * STREAMS) + cell, balance(logits, eps, iterations))

    result = tl.sum(values * pre[:, None], axis=0)  # [D]
    if IS_NORMED:
        rounded = result.to(x.dtype.element_ty).to(tl.float32)
        unit = rounded * tl.rsqrt(tl.sum(rounded * rounded, axis=0) / DIMS + norm_eps)
        result = unit * tl.load(norm_weight + dim, mask=inside, other=0.0)
    tl.store(x + token * DIMS + dim, result.to(x.dtype.element_ty), mask=inside)


@jit
def balance(logits: tl.tensor, eps: tl.tensor, iterations: tl.tensor) -> tl.tensor:
    """Softmax over rows, then Sinkhorn: columns, and rows and columns `iterations` - 1 times. [S, S]."""
    power = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    cells = power / tl.sum(power, axis=1)[:, None] + eps
    cells = cells / (tl.sum(cells, axis=0)[None, :] + eps)
    for _ in range(1, iterations):
        cells = cells / (tl.sum(cells, axis=1)[:, None] + eps)
        cells = cells / (tl.sum(cells, axis=0)[None, :] + eps)
    return cells


@jit
def expand(
    output: tl.tensor,
    streams: tl.tensor,
    post: tl.tensor,
    comb: tl.tensor,
    expanded: tl.tensor,
    STREAMS: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Shapes as in the package."""
    token = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = dim < DIMS
    spread = tl.load(output + token * DIMS + dim, mask=inside, other=0.0).to(tl.float32)
    first = token * (STREAMS * DIMS) + dim
    for k in tl.static_range(STREAMS):
        total = tl.load(post + token * STREAMS + k) * spread
        for j in tl.static_range(STREAMS):
            weight = tl.load(comb + token * (STREAMS * STREAMS) + j * STREAMS + k)
            total += weight * tl.load(streams + first + j * DIMS, mask=inside, other=0.0).to(tl.float32)
        tl.store(expanded + first + k * DIMS, total.to(expanded.dtype.element_ty), mask=inside)
