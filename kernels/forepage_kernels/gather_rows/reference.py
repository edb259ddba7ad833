"""Plain torch gather_rows."""

import torch
from torch import Tensor

from forepage_kernels.layout import RowPool
from forepage_kernels.spans import read_spans


def gather_rows(
    pool: RowPool, arena: Tensor, *, slots: Tensor, plane_offsets: Tensor, entries: Tensor
) -> None:
    """See the package; a slot or offset out of range raises."""
    layout = pool.layout
    present = slots >= 0
    slots, planes, rows = slots[present], plane_offsets[present], entries[present]
    block = torch.div(slots, layout.entries, rounding_mode="floor")
    entry = slots % layout.entries
    values = read_spans(arena, planes + rows * layout.value_bytes, layout.value_bytes)
    pool.values[block, entry] = values
    if layout.scale_bytes:
        first_scale = planes + layout.entries * layout.value_bytes
        scales = read_spans(arena, first_scale + rows * layout.scale_bytes, layout.scale_bytes)
        pool.scales[block, entry] = scales
