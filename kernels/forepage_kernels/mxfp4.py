"""MXFP4: two E2M1 values a byte (low nibble first) and one UE8M0 scale for each 32 of them.

    E2M1 code   0  1   2  3   4  5  6  7     bit 3 is the sign
    value       0  .5  1  1.5 2  3  4  6
    UE8M0       exponent + 127; 255 is NaN

A group with a value that isn't finite gets the scale NaN and zero codes, so it can't pass for numbers.
Sources: OCP Microscaling formats v1.0; DeepSeek-V4's QAT simulation,
s = 2^ceil(log2(max(amax, 6 * 2^-126) / 6)).
"""

import torch
from torch import Tensor

MX_GROUP = 32
MX_NAN = 255
INFINITY_BITS = 0x7F800000
MIN_AMAX_BITS = 0x01C00000
"""6 * 2^-126: the smallest scale is the smallest normal fp32."""


def encode_mxfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """f32 [n, d] (d a multiple of 32) -> values u8 [n, d / 2], scales u8 [n, d / 32]; ties to even codes.

    amax <= 6 * 2^e exactly when amax / 2^2 <= 1.5 * 2^e: the exponent is read off amax's bits.
    """
    groups = x.reshape(x.shape[0], x.shape[1] // MX_GROUP, MX_GROUP)  # [n, g, 32]
    amax = (groups.view(torch.int32) & 0x7FFFFFFF).amax(dim=-1).clamp(min=MIN_AMAX_BITS)  # bits
    exponents = (amax >> 23) - 2 + ((amax & 0x7FFFFF) > 0x400000).to(torch.int32)  # [n, g]
    finite = amax < INFINITY_BITS
    exponents = torch.where(finite, exponents, MX_NAN)
    inverse = ((254 - exponents) << 23).view(torch.float32)  # where not finite, of no use
    codes = torch.where(finite.unsqueeze(-1), _codes(groups * inverse.unsqueeze(-1)), 0)
    low, high = codes.view(x.shape[0], x.shape[1] // 2, 2).unbind(-1)  # [n, d / 2]
    return (low | high << 4).to(torch.uint8), exponents.to(torch.uint8)


def decode_mxfp4(values: Tensor, scales: Tensor) -> Tensor:
    """values u8 [n, d / 2], scales u8 [n, d / 32] -> f32 [n, d]."""
    codes = torch.stack((values & 0xF, values >> 4), dim=-1).flatten(-2).to(torch.int32)  # [n, d]
    magnitude = codes & 7
    # From code 2 on the bits are those of an fp32 with one mantissa bit; below, the value is code / 2.
    normal = ((magnitude + 252) << 22).view(torch.float32)
    absolute = torch.where(magnitude < 2, magnitude * 0.5, normal)
    signed = torch.where(codes > 7, -absolute, absolute).view(*scales.shape, MX_GROUP)  # [n, g, 32]
    scale = scales.view(torch.float8_e8m0fnu).to(torch.float32)  # [n, g]
    return (signed * scale.unsqueeze(-1)).flatten(1)


def simulate_mxfp4(x: Tensor) -> Tensor:
    """x f32 [..., d], rounded to what MXFP4 can hold."""
    return decode_mxfp4(*encode_mxfp4(x.reshape(-1, x.shape[-1]))).view(x.shape)


def _codes(x: Tensor) -> Tensor:
    """|x| <= 6 -> E2M1 codes i32: how many of the seven midpoints lie below; ties go to even codes."""
    absolute = x.abs()
    code = (absolute > 0.25).to(torch.int32)
    for midpoint in (1.25, 2.5, 5.0):
        code += absolute > midpoint
    for midpoint in (0.75, 1.75, 3.5):
        code += absolute >= midpoint
    return code | (x.view(torch.int32) >> 28 & 8)
