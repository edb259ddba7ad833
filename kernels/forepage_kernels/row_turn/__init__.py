"""Rotations of rows: RoPE on the trailing dims' interleaved pairs, and the Hadamard transform."""

import torch
from torch import Tensor

from forepage_kernels.checks import check_tensor
from forepage_kernels.errors import ShapeError
from forepage_kernels.row_turn import reference

DTYPES = (torch.float32, torch.bfloat16)


def turn_pairs(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Turn interleaved pairs of the trailing dims by the row's angles, in fp32; dtype of x out.

    Shapes: x f32|bf16 [n, ..., d], cos, sin f32 [n, 1, ..., r / 2], or one row for all: rows of x under one n
    turn alike. The trailing r of d dims are turned (d - r is even); `inverse` turns back.
    Source: DeepSeek-V4 inference/model.py, apply_rotary_emb.
    """
    plain_dims = x.shape[-1] - 2 * cos.shape[-1]
    if x.dtype not in DTYPES or plain_dims < 0 or plain_dims % 2 or cos.shape[-1] == 0:
        raise ShapeError(f"x: {x.dtype} {list(x.shape)} can't be turned by {list(cos.shape)} angles")
    num_angles = cos.numel() // cos.shape[-1]
    if num_angles != 1 and not num_angles == cos.shape[0] == x.shape[0]:
        raise ShapeError(f"cos: {list(cos.shape)} is not a row of angles for each row of {list(x.shape)}")
    check_tensor("cos", cos, dtype=torch.float32, shape=cos.shape, device=x.device)
    check_tensor("sin", sin, dtype=torch.float32, shape=cos.shape, device=x.device)
    if x.is_cuda:
        from forepage_kernels.row_turn.kernel import turn_pairs as launch

        return launch(x, cos, sin, inverse=inverse)
    return reference.turn_pairs(x, cos, sin, inverse=inverse)


def hadamard(x: Tensor) -> Tensor:
    """Rotate the last dim, a power of two, by the orthonormal Sylvester-Hadamard matrix. f32 [..., d]."""
    if x.is_cuda and x.dtype == torch.float32:
        from forepage_kernels.row_turn.kernel import hadamard as launch

        return launch(x)
    return reference.hadamard(x)
