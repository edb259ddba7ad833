"""Stored rows or keys as a contiguous matrix: prefill reads each of them for thousands of tokens."""

import torch
from torch import Tensor

from forepage_kernels.checks import check_tensor
from forepage_kernels.errors import ShapeError
from forepage_kernels.layout import KeyPool, RowPool
from forepage_kernels.unpack_rows import reference


def unpack_rows(pool: RowPool | KeyPool, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """Decode the entries at slots i64 [n] -> [n, dims] of dtype f32 or bf16; a negative slot gives zeros.

    Exact in both for quantised pools; bf16 is refused for pools of fp32 values.
    """
    check_tensor("slots", slots, dtype=torch.int64, shape=[None], device=pool.bytes.device)
    if dtype not in (torch.float32, torch.bfloat16):
        raise ShapeError(f"dtype: must be float32 or bfloat16, got {dtype}")
    if dtype == torch.bfloat16 and pool.layout.format == "fp32":
        raise ShapeError("dtype: fp32 values don't fit bfloat16")
    if slots.is_cuda and pool.layout.format != "fp32":
        from forepage_kernels.unpack_rows.kernel import unpack_rows as launch

        return launch(pool, slots, dtype)
    return reference.unpack_rows(pool, slots, dtype)
