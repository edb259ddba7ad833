"""Plain torch compress_token: every row gathers its window, whether it closes or not."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from forepage_kernels.compress_quantize import compress_quantize
from forepage_kernels.layout import KeyPool, RowPool

if TYPE_CHECKING:
    from forepage_kernels.compress_token import Window

KV, GATE = 0, 1
"""The two planes of a token's state."""


def compress_token(
    projected: Tensor,
    state: Tensor,
    slots: Tensor,
    positions: Tensor,
    how: "Window",
    *,
    pool: RowPool | KeyPool,
    targets: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> None:
    """See the package."""
    ring = state.shape[2]
    kv, gate = projected.chunk(2, dim=-1)
    tokens = torch.stack((kv, gate + how.position_bias[positions % how.ratio]), dim=1)  # [B, 2, C]
    state[slots, :, positions % ring] = tokens
    kv, gate = (_closing_window(state[:, plane], slots, positions, how) for plane in (KV, GATE))
    if how.overlaps:
        # Entry 0 has no previous window: its places hold nothing, whatever the ring has there.
        is_previous = torch.arange(2 * how.ratio, device=positions.device) < how.ratio
        void = ((positions < how.ratio)[:, None] & is_previous).unsqueeze(-1)
        kv, gate = kv.masked_fill(void, 0.0), gate.masked_fill(void, float("-inf"))
    compress_quantize(
        kv, gate, how.norm_weight, cos, sin, pool, targets, rope_dims=how.rope_dims, eps=how.eps
    )


def _closing_window(plane: Tensor, slots: Tensor, positions: Tensor, how: "Window") -> Tensor:
    """The tokens that positions' entries pool, in order: plane [num_slots, ring, C] -> [B, W, d]."""
    if not how.overlaps:
        return plane[slots]  # [B, ratio, d]
    dims = how.norm_weight.shape[0]
    halves = plane.view(plane.shape[0], 2, how.ratio, -1)  # even windows, odd windows
    parity = positions // how.ratio % 2
    previous = halves[slots, 1 - parity][..., :dims]  # [B, ratio, d]: A
    current = halves[slots, parity][..., dims:]  # B
    return torch.cat((previous, current), dim=1)
