"""Products in fp32 of matrices that a checkpoint stores in bf16: head, router, compressors.

A product of two bf16 values is exact in fp32. So with bf16 inputs only the sum rounds on a GPU's tensor
cores, to less than 2^-20 of the magnitudes that are summed (on an H100 some ten times an fp32 product's
error, a thousandth of what rounding the inputs to bf16 does), and the matrix is read in half the bytes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_PARTS = 3
"""bf16 parts whose sum is an fp32 value: 8 of its 24 significant bits each."""


def fp32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, I], weight [O, I] f32, or bf16 where x is bf16 on a GPU -> f32 [n, O]."""
    if weight.dtype is torch.bfloat16:
        return torch.mm(x, weight.mT, out_dtype=torch.float32)
    return F.linear(x.float(), weight)


def bf16_parts(weight: Tensor) -> Tensor:
    """f32 [O, I] as bf16 [NUM_PARTS * O, I]: the parts below one another, whose sum it is.

    Exact while the last part is no smaller than bf16 has exponents for (about 1e-38).
    """
    parts, rest = [], weight
    for _ in range(NUM_PARTS):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1].float()
    return torch.cat(parts)


def split_linear(x: Tensor, parts: Tensor) -> Tensor:
    """x bf16 [n, I] times the matrix of which `parts` are the `bf16_parts`, on a GPU -> f32 [n, O]."""
    return fp32_linear(x, parts).view(x.shape[0], NUM_PARTS, -1).sum(1)
