"""Reads of spans at arbitrary offsets of flat bytes, for the references; nothing is copied but the spans."""

import torch
from torch import Tensor

LANE_BYTES = 8


def read_spans(flat: Tensor, offsets: Tensor, width: int) -> Tensor:
    """flat u8 [A], offsets i64 [n] (all inside) -> u8 [n, width]. Raises: IndexError past the end."""
    aligned = (
        width % LANE_BYTES == 0
        and flat.storage_offset() % LANE_BYTES == 0
        and not bool((offsets % LANE_BYTES).any())
    )
    if not aligned:
        return _gather(flat, offsets, width)
    lanes = flat[: flat.shape[0] // LANE_BYTES * LANE_BYTES].view(torch.int64)
    return _gather(lanes, offsets // LANE_BYTES, width // LANE_BYTES).view(torch.uint8)


def _gather(words: Tensor, offsets: Tensor, width: int) -> Tensor:
    """Index the overlapping view whose row i begins at word i; no index per word is made."""
    starts = max(words.shape[0] - width + 1, 0)
    return words.as_strided((starts, width), (1, 1), words.storage_offset())[offsets]
