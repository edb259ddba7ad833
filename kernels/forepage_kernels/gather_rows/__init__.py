"""Copy single KV rows, values and scales, from planes of the host arena into pool slots."""

import torch
from torch import Tensor

from forepage_kernels.checks import check_arena, check_tensor
from forepage_kernels.gather_rows import reference
from forepage_kernels.layout import RowPool


def gather_rows(
    pool: RowPool, arena: Tensor, *, slots: Tensor, plane_offsets: Tensor, entries: Tensor
) -> None:
    """Pool slot <- row `entries[i]` of the plane that begins at byte `plane_offsets[i]` of the arena.

    Shapes: arena u8 [A]; slots, plane_offsets (multiples of 8), entries i64 [n]. A row is two spans:
    its values, and its scales behind the plane's values. A negative slot skips its entry; the others
    are distinct. With a CUDA pool the arena may be host memory registered with CUDA.
    """
    device = pool.bytes.device
    check_arena("arena", arena, device=device)
    check_tensor("slots", slots, dtype=torch.int64, shape=[None], device=device)
    check_tensor("plane_offsets", plane_offsets, dtype=torch.int64, shape=slots.shape, device=device)
    check_tensor("entries", entries, dtype=torch.int64, shape=slots.shape, device=device)
    if device.type == "cuda":
        from forepage_kernels.gather_rows.kernel import gather_rows as launch

        launch(pool, arena, slots=slots, plane_offsets=plane_offsets, entries=entries)
    else:
        reference.gather_rows(pool, arena, slots=slots, plane_offsets=plane_offsets, entries=entries)
