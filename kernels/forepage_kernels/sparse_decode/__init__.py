"""Decode attention over the selected compressed rows and the sliding window, with a sink."""

import torch
from torch import Tensor

from forepage_kernels.checks import check_tensor
from forepage_kernels.errors import ShapeError
from forepage_kernels.layout import RowPool
from forepage_kernels.sparse_decode import reference


def sparse_decode(
    q: Tensor,
    compressed: RowPool | None,
    compressed_slots: Tensor,
    window: RowPool,
    window_slots: Tensor,
    sinks: Tensor,
    *,
    softmax_scale: float,
) -> Tensor:
    """Attend the rows of both slot lists; keys and values are the same row.

    Shapes: q f32|bf16 [B, H, d], compressed_slots i64 [B, K] (K = 0 without a pool), window_slots
    i64 [B, W], sinks f32 [H] -> q's dtype [B, H, d]. Negative slots are skipped. With m the largest
    score: out = sum exp(s - m) row / (sum exp(s - m) + exp(sink - m)); no row at all gives zeros.
    The result depends only on the attended rows in list order (absent ones at the end).
    Source: DeepSeek-V4 inference/model.py, Attention; the sink has no value row.
    """
    device, dims = q.device, window.layout.head_dim
    check_tensor("q", q, dtype=(torch.float32, torch.bfloat16), shape=[None, None, dims])
    check_tensor(
        "compressed_slots", compressed_slots, dtype=torch.int64, shape=[q.shape[0], None], device=device
    )
    check_tensor("window_slots", window_slots, dtype=torch.int64, shape=[q.shape[0], None], device=device)
    check_tensor("sinks", sinks, dtype=torch.float32, shape=[q.shape[1]], device=device)
    _check_pools(compressed, compressed_slots, window, device)
    if q.is_cuda and window.layout.format == "fp8":
        from forepage_kernels.sparse_decode.kernel import sparse_decode as launch

        return launch(
            q, compressed, compressed_slots, window, window_slots, sinks, softmax_scale=softmax_scale
        )
    return reference.sparse_decode(
        q, compressed, compressed_slots, window, window_slots, sinks, softmax_scale=softmax_scale
    )


def _check_pools(
    compressed: RowPool | None, compressed_slots: Tensor, window: RowPool, device: torch.device
) -> None:
    if window.bytes.device != device:
        raise ShapeError(f"window: must be on {device}, got {window.bytes.device}")
    if compressed is None:
        if compressed_slots.shape[1]:
            raise ShapeError("compressed_slots: must be [B, 0] without a compressed pool")
        return
    if compressed.bytes.device != device:
        raise ShapeError(f"compressed: must be on {device}, got {compressed.bytes.device}")
    ours, theirs = compressed.layout, window.layout
    if (ours.nope_dims, ours.rope_dims, ours.format) != (theirs.nope_dims, theirs.rope_dims, theirs.format):
        raise ShapeError(f"compressed: rows {ours} differ from the window's {theirs}")
