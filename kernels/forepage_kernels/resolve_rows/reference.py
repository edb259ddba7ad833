"""Plain torch resolve_rows."""

import torch
from torch import Tensor

from forepage_kernels.layout import ABSENT


def resolve_rows(
    selected: Tensor,
    row_table: Tensor,
    *,
    staging: Tensor,
    records: Tensor,
    plane_offset: int,
    block_entries: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the package; the fields of Resolved."""
    entries = selected.clamp(min=0)
    resident = _slots(row_table, entries, block_entries)
    resident = torch.where(selected >= 0, resident, ABSENT)
    absent = (selected >= 0) & (resident < 0)  # [B, k]
    places = torch.arange(selected.shape[1], device=selected.device).expand_as(selected)
    staged = _slots(staging, places, block_entries) if staging.shape[1] else places * 0 + ABSENT
    offsets = records.gather(1, entries // block_entries)  # [B, k]
    pullable = absent & (staged >= 0) & (offsets >= 0)
    return (
        torch.where(pullable, staged, resident),
        torch.where(pullable, staged, ABSENT).flatten(),
        (offsets + plane_offset).flatten(),
        (entries % block_entries).flatten(),
        pullable.sum(1),
        (absent & ~pullable).sum(1),
    )


def _slots(table: Tensor, entries: Tensor, block_entries: int) -> Tensor:
    block_ids = table.gather(1, entries // block_entries).long()
    return torch.where(block_ids >= 0, block_ids * block_entries + entries % block_entries, ABSENT)
