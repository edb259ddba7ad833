# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton project_streams: bf16 streams times a few fp32 rows on tensor cores, as accurate as in fp32.

An fp32 weight is the exact sum of three bf16 numbers, and each of their products with a bf16 stream is exact
in fp32. The columns are shared out over programs, in parts that depend on their number alone, and `collapse`
adds the parts: so a token's bits do not depend on the others'.
"""

import torch
import triton.language as tl
from torch import Tensor

from forepage_kernels.jit import is_interpreted, jit_unspecialised, next_power_of_2, on_device_of

PART_COLUMNS = 512
STEP_COLUMNS = 128
TILE_TOKENS = 16
"""The smallest side of a product, for every batch: another tile might round otherwise."""
MIN_OUTPUTS = 16


def project_streams(streams: Tensor, fn: Tensor) -> Tensor:
    """See the package; bf16 streams."""
    num_tokens = streams.shape[0]
    outputs, inputs = fn.shape
    num_parts = -(-inputs // PART_COLUMNS)
    parts = torch.empty(num_parts, num_tokens, outputs, device=streams.device)
    if num_tokens:
        with on_device_of(streams):
            project[(num_parts, -(-num_tokens // TILE_TOKENS))](
                streams,
                fn,
                parts,
                num_tokens,
                INPUTS=inputs,
                OUTPUTS=outputs,
                BLOCK_O=max(MIN_OUTPUTS, next_power_of_2(outputs)),
                TOKENS=TILE_TOKENS,
                PART=PART_COLUMNS,
                STEP=STEP_COLUMNS,
                BF16=not is_interpreted(),
                num_warps=4,
                num_stages=2,
            )
    return parts


@jit_unspecialised("num_tokens")
def project(
    streams: tl.tensor,
    fn: tl.tensor,
    parts: tl.tensor,
    num_tokens: tl.tensor,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    TOKENS: tl.constexpr,
    PART: tl.constexpr,
    STEP: tl.constexpr,
    BF16: tl.constexpr,
) -> None:
    """streams bf16 [n, INPUTS], fn f32 [OUTPUTS, INPUTS] -> parts f32 [P, n, OUTPUTS]."""
    part = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    output = tl.arange(0, BLOCK_O)
    is_token, is_output = token < num_tokens, output < OUTPUTS
    acc = tl.zeros([TOKENS, BLOCK_O], tl.float32)
    for first in range(part * PART, (part + 1) * PART, STEP):
        column = first + tl.arange(0, STEP)
        inside = (column < INPUTS)[None, :]
        x = tl.load(
            streams + token[:, None] * INPUTS + column[None, :], mask=is_token[:, None] & inside, other=0.0
        )
        weight = tl.load(
            fn + output[:, None] * INPUTS + column[None, :], mask=is_output[:, None] & inside, other=0.0
        )
        if BF16:
            high = weight.to(tl.bfloat16)
            rest = weight - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            acc = tl.dot(x, tl.trans(low), acc)
            acc = tl.dot(x, tl.trans(middle), acc)
            acc = tl.dot(x, tl.trans(high), acc)
        else:
            acc = tl.dot(x.to(tl.float32), tl.trans(weight), acc, input_precision="ieee")
    place = (part.to(tl.int64) * num_tokens + token) * OUTPUTS
    tl.store(parts + place[:, None] + output[None, :], acc, mask=is_token[:, None] & is_output[None, :])
