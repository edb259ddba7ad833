"""Plain torch fp8_linear: the weight dequantised whole, the product in fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from forepage_kernels.fp8_linear.weight import FP8_TILE, Fp8Weight
from forepage_kernels.layout import KeyLayout, decode_keys, encode_keys

_GROUP = KeyLayout(entries=1, dims=FP8_TILE, format="fp8")
"""128 values rounded together: as keys are."""


def fp8_linear(x: Tensor, weight: Fp8Weight, *, quantise: bool) -> Tensor:
    """See the package."""
    inputs = (simulate_fp8(x) if quantise else x).float()
    matrix = weight.dequantised(torch.float32)
    if x.shape[1] == 1:
        return F.linear(inputs, matrix).to(x.dtype)
    return torch.einsum("ngi,goi->ngo", inputs, matrix.view(x.shape[1], -1, x.shape[2])).to(x.dtype)


def simulate_fp8(x: Tensor) -> Tensor:
    """x [..., I] rounded to e4m3 with one power-of-two scale per 128 columns, in x's dtype."""
    columns = x.shape[-1]
    padded = F.pad(x.float(), (0, -columns % FP8_TILE))  # [..., t * 128]
    rounded = decode_keys(*encode_keys(padded.reshape(-1, FP8_TILE), _GROUP), _GROUP)
    return rounded.view(padded.shape)[..., :columns].to(x.dtype)
