"""Plain torch unpack_rows."""

import torch
from torch import Tensor

from forepage_kernels.layout import KeyPool, RowPool, load_rows


def unpack_rows(pool: RowPool | KeyPool, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """See the package."""
    return load_rows(pool, slots).to(dtype)
