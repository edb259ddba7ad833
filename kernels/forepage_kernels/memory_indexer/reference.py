"""Plain torch memory_indexer: decode a sequence's present planes, one matrix product a layer."""

import torch
from torch import Tensor

from forepage_kernels.layout import KeyLayout, decode_keys
from forepage_kernels.spans import read_spans


def memory_indexer(
    queries: Tensor,
    weights: Tensor,
    keys: Tensor,
    *,
    layout: KeyLayout,
    plane_offsets: Tensor,
    threshold: float,
) -> Tensor:
    """See the package."""
    batch, num_blocks, layers = plane_offsets.shape
    scores = weights.new_zeros(batch, num_blocks, layout.entries)
    asked = (queries.bfloat16() if layout.rotated else queries).float()
    for b in range(batch):
        for layer in range(layers):
            offsets = plane_offsets[b, :, layer]
            present = (offsets >= 0).nonzero().squeeze(1)  # [m]
            k = _read_keys(keys, offsets[present], layout).to(queries.device)  # [m * entries, D]
            logits = torch.relu(k @ asked[b, layer].T) @ weights[b, layer]
            probability = torch.sigmoid(logits).view(-1, layout.entries)
            scores[b, present] = torch.maximum(scores[b, present], probability)
    return torch.where(scores > threshold, scores, 0.0).view(batch, -1)


def _read_keys(keys: Tensor, offsets: Tensor, layout: KeyLayout) -> Tensor:
    """Every key of the planes at offsets i64 [m] -> f32 [m * entries, D]."""
    planes = read_spans(keys, offsets.to(keys.device), layout.plane_bytes)  # u8 [m, plane_bytes]
    split = layout.entries * layout.value_bytes
    total = offsets.shape[0] * layout.entries
    values = planes[:, :split].reshape(total, layout.value_bytes)
    scales = planes[:, split:].reshape(total, layout.scale_bytes)
    return decode_keys(values, scales, layout)
