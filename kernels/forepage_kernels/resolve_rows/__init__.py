"""From selected entries to the rows that attention reads: where each lies, and which must be pulled first."""

from dataclasses import dataclass

import torch
from torch import Tensor

from forepage_kernels.checks import check_tensor
from forepage_kernels.resolve_rows import reference


@dataclass(frozen=True)
class Resolved:
    """Slots of the selected rows, and the pulls that fill some of them; ABSENT (-1) where there is nothing.

    slots i64 [B, k] to attend; pull_slots, plane_offsets, entries i64 [B * k] as `gather_rows` takes them;
    pulled, unserved i64 [B]: how many are pulled, and how many can be neither read nor pulled.
    """

    slots: Tensor
    pull_slots: Tensor
    plane_offsets: Tensor
    entries: Tensor
    pulled: Tensor
    unserved: Tensor


def resolve_rows(
    selected: Tensor,
    row_table: Tensor,
    *,
    staging: Tensor,
    records: Tensor,
    plane_offset: int,
    block_entries: int,
) -> Resolved:
    """The j-th of the list goes, if it isn't resident, to place j of its sequence's staging blocks.

    Shapes: selected i64 [B, k] entries or -1, row_table i32 [B, M] block_idx -> row block id, staging i64
    [B, S] row block ids (k <= S * block_entries, or S = 0: nothing can be pulled), records i64 [B, M] byte
    offset of a block's record in the arena; negative is none everywhere. `plane_offset` is where the layer's
    rows begin in a record.
    """
    device, batch = selected.device, selected.shape[0]
    check_tensor("selected", selected, dtype=torch.int64, shape=[None, None])
    check_tensor("row_table", row_table, dtype=torch.int32, shape=[batch, None], device=device)
    check_tensor("staging", staging, dtype=torch.int64, shape=[batch, None], device=device)
    check_tensor("records", records, dtype=torch.int64, shape=row_table.shape, device=device)
    if selected.is_cuda:
        from forepage_kernels.resolve_rows.kernel import resolve_rows as resolve
    else:
        resolve = reference.resolve_rows
    parts = resolve(
        selected,
        row_table,
        staging=staging,
        records=records,
        plane_offset=plane_offset,
        block_entries=block_entries,
    )
    return Resolved(*parts)
