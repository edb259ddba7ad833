"""Products that the model computes in fp32: of its head, its router and its compressors.

A release stores these matrices in bf16, and a bf16 model's activations are bf16: each product of two such
numbers is exact in fp32, so on tensor cores, which sum in fp32, only the sums round, and the matrix is read
in half the bytes, with no copy of the activations.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def fp32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x f32|bf16 [n, I], weight f32|bf16 [O, I] -> x weight^T, summed in fp32: f32 [n, O].

    Of two bf16 matrices on a GPU, sums go in steps of 16 columns. Their error's root mean square is at most
    I / 16 times 2^-23 of their own.
    """
    if x.is_cuda and x.dtype == weight.dtype == torch.bfloat16:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return F.linear(x.float(), weight.float())
