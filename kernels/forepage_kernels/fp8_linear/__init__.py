"""A product with an FP8 weight as stored: e4m3 values, one power-of-two scale per 128 x 128."""

import torch
from torch import Tensor

from forepage_kernels.checks import check_tensor
from forepage_kernels.errors import ShapeError
from forepage_kernels.fp8_linear import reference
from forepage_kernels.fp8_linear.weight import Fp8Weight as Fp8Weight


def fp8_linear(x: Tensor, weight: Fp8Weight, *, quantise: bool = False) -> Tensor:
    """x @ weight^T for each of G groups of columns: group g of x meets rows g * O .. of the weight.

    Shapes: x f32|bf16 [n, G, I], weight [G * O, I] -> x's dtype [n, G, O]; sums are fp32.
    `quantise`: x is rounded to e4m3 with one power-of-two scale per (row, 128 columns) first, as the
    official products do; without it only the weight is quantised, and the result is that of bf16 weights.
    A row of up to 256 does not depend on the others; nor does one of more, whose sums may differ from those.
    Source: DeepSeek-V4 inference/kernel.py, fp8_gemm and act_quant.
    """
    outputs, inputs = weight.values.shape
    check_tensor("x", x, dtype=(torch.float32, torch.bfloat16), shape=[None, None, inputs])
    if x.shape[1] == 0 or outputs % x.shape[1]:
        raise ShapeError(f"x: {x.shape[1]} groups do not divide {outputs} rows")
    weight.check(x.device)
    if x.is_cuda and x.dtype == torch.bfloat16:
        from forepage_kernels.fp8_linear.kernel import fp8_linear as launch

        return launch(x, weight, quantise=quantise)
    return reference.fp8_linear(x, weight, quantise=quantise)
