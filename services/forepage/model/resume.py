"""Resume records: what a sequence needs beside its blocks to go on, as bytes.

Taken where the token count is a multiple of 256: no c128 window is open there, and of the c4 state only
the A halves of the last closed window will be read again. Layout, packed (sizes from `kv/geometry.py`):

    window   every layer's ring, as in the window pool
    rows     f32 [n_c4, 2 (kv, gate), 4 tokens, head_dim]
    keys     f32 [n_c4, 2 (kv, gate), 4 tokens, index_dims]
"""

import torch
from torch import Tensor

from forepage.errors import IntegrityError
from forepage.kv.geometry import C4_RATIO, STATE_WINDOW, KvGeometry
from forepage.model.kv_pools import KvPools


def snapshot(pools: KvPools, slot: int, num_tokens: int, geometry: KvGeometry) -> Tensor:
    """The record of a sequence slot that has processed num_tokens: u8 [geometry.resume_bytes].

    Raises: IntegrityError unless num_tokens is a positive multiple of 256.
    """
    _check_point(num_tokens, geometry)
    halves = [_a_halves(pools.c4_state, slot, num_tokens), _a_halves(pools.key_state, slot, num_tokens)]
    parts = [pools.window[slot], *(half.contiguous().view(torch.uint8).flatten() for half in halves)]
    return torch.cat(parts)


def restore(pools: KvPools, slot: int, num_tokens: int, geometry: KvGeometry, payload: Tensor) -> None:
    """Put a record back into any slot of any pools of the same geometry; other state is left as it is.

    Raises: IntegrityError if the payload is not u8 [geometry.resume_bytes], or as `snapshot`.
    """
    _check_point(num_tokens, geometry)
    if payload.dtype != torch.uint8 or payload.shape != (geometry.resume_bytes,):
        raise IntegrityError(
            f"resume record: {payload.dtype} {list(payload.shape)}, expected u8 [{geometry.resume_bytes}]"
        )
    pools.window[slot] = payload[: geometry.window_bytes]
    offset = geometry.window_bytes
    for state in (pools.c4_state, pools.key_state):
        half = _a_halves(state, slot, num_tokens)
        num_bytes = half.numel() * half.element_size()
        # A clone, because a record may begin at any byte and f32 views need aligned storage.
        half.copy_(payload[offset : offset + num_bytes].clone().view(torch.float32).view(half.shape))
        offset += num_bytes


def _a_halves(state: Tensor, slot: int, num_tokens: int) -> Tensor:
    """View of the last closed window's A halves: [num_slots, n_c4, 2, 8, 2 * d] -> [n_c4, 2, 4, d]."""
    first = (num_tokens - C4_RATIO) % STATE_WINDOW
    return state[slot, :, :, first : first + C4_RATIO, : state.shape[-1] // 2]


def _check_point(num_tokens: int, geometry: KvGeometry) -> None:
    if num_tokens <= 0 or num_tokens % geometry.block_tokens:
        raise IntegrityError(
            f"resume record at {num_tokens} tokens: only at multiples of {geometry.block_tokens}"
        )
