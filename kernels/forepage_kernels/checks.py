"""Argument checks of the ops' public functions: all of them raise ShapeError and name the argument."""

from collections.abc import Sequence

import torch
from torch import Tensor

from forepage_kernels.errors import ShapeError


def check_tensor(
    name: str,
    tensor: Tensor,
    *,
    dtype: torch.dtype | tuple[torch.dtype, ...],
    shape: Sequence[int | None],
    device: torch.device | None = None,
) -> None:
    """Require dtype, shape (None = any size), a contiguous layout and, if given, the device."""
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if tensor.dtype not in dtypes:
        raise ShapeError(f"{name}: dtype must be one of {dtypes}, got {tensor.dtype}")
    fits = tensor.dim() == len(shape) and all(
        want is None or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"
        raise ShapeError(f"{name}: shape must be {wanted}, got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ShapeError(f"{name}: must be contiguous, got strides {list(tensor.stride())}")
    if device is not None and tensor.device != device:
        raise ShapeError(f"{name}: must be on {device}, got {tensor.device}")


def check_arena(name: str, arena: Tensor, *, device: torch.device) -> None:
    """Require flat bytes that `device` can read: its own memory or, for a GPU, registered host memory."""
    check_tensor(name, arena, dtype=torch.uint8, shape=[None])
    if device.type == "cpu" and arena.device != device:
        raise ShapeError(f"{name}: must be on {device}, got {arena.device}")
