"""Cases of the products with quantised weights: routed experts in MXFP4, linear layers in FP8."""

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Call, Case, Ceiling, worst_error
from forepage_kernels.fp8_linear import Fp8Weight, fp8_linear
from forepage_kernels.fp8_linear.reference import fp8_linear as fp8_linear_reference
from forepage_kernels.moe import Fp4Experts, moe
from forepage_kernels.moe.reference import moe as moe_reference
from forepage_kernels.mxfp4 import decode_mxfp4

HIDDEN, EXPERT_SIZE, CHOICES = 4_096, 2_048, 6
HELD_EXPERTS = 32
"""A rank's share of 256; all tokens choose among them, as those of eight ranks together do."""
SWIGLU_LIMIT = 10.0
TOKENS = (1, 8, 64, 256, 2_048)
LINEARS = {
    "wq_a": (1, 1_024, 4_096),
    "wq_b": (1, 32_768, 1_024),
    "wkv": (1, 512, 4_096),
    "wo_a": (8, 1_024, 4_096),
    "wo_b": (1, 4_096, 8_192),
    "shared w1 and w3": (1, 4_096, 4_096),
}
"""Name -> groups, outputs and inputs of a group."""
LINEAR_TOKENS = (1, 64, 256, 2_048)
ROUTINGS = 4
CACHED_BYTES = 100 << 20
"""Twice the L2 cache: calls go round as many copies of a weight as hold this much."""
CHECKED_TOKENS = 64
TOLERANCE = 2e-2


def weight_cases(device: torch.device) -> Iterator[Case]:
    """Every case of the two kernels."""
    experts = _experts(device)
    plain = [
        torch.stack([decode_mxfp4(v, s).bfloat16() for v, s in zip(values, scales, strict=True)])
        for values, scales in ((experts.w13, experts.w13_scales), (experts.w2, experts.w2_scales))
    ]
    for tokens in TOKENS:
        yield _moe_case(experts, plain, tokens, device)
    del experts, plain
    for name, shape in LINEARS.items():
        for tokens in LINEAR_TOKENS:
            yield _linear_case(name, shape, tokens, device)


def _experts(device: torch.device) -> Fp4Experts:
    def values(*shape: int) -> Tensor:
        return torch.randint(256, shape, dtype=torch.uint8, device=device)

    def scales(inputs: int, rows: int) -> Tensor:
        middle = 127 + round(math.log2(inputs**-0.5 / 2.9))
        shape = (HELD_EXPERTS, rows, inputs // 32)
        return torch.randint(middle - 1, middle + 2, shape, dtype=torch.uint8, device=device)

    return Fp4Experts(
        w13=values(HELD_EXPERTS, 2 * EXPERT_SIZE, HIDDEN // 2),
        w13_scales=scales(HIDDEN, 2 * EXPERT_SIZE),
        w2=values(HELD_EXPERTS, HIDDEN, EXPERT_SIZE // 2),
        w2_scales=scales(EXPERT_SIZE, HIDDEN),
        first=0,
        total=HELD_EXPERTS,
    )


def _moe_case(experts: Fp4Experts, plain: list[Tensor], tokens: int, device: torch.device) -> Case:
    x = torch.randn(tokens, HIDDEN, device=device, dtype=torch.bfloat16)
    routings = [
        torch.rand(tokens, HELD_EXPERTS, device=device).argsort(dim=1)[:, :CHOICES].contiguous()
        for _ in range(ROUTINGS)
    ]
    weights = torch.rand(tokens, CHOICES, device=device)

    def run(chosen: Tensor) -> Tensor:
        return moe(x, chosen, weights, experts, limit=SWIGLU_LIMIT)

    def check() -> float:
        few = slice(min(tokens, CHECKED_TOKENS))
        got = moe(x, routings[0], weights, experts, limit=SWIGLU_LIMIT)[few]
        wanted = moe_reference(x[few], routings[0][few], weights[few], experts, limit=SWIGLU_LIMIT)
        return worst_error("moe", got, wanted, tolerance=TOLERANCE)

    parts = (experts.w13, experts.w13_scales, experts.w2, experts.w2_scales)
    expert_bytes = sum(part[0].numel() for part in parts)
    busy = sum(len(chosen.unique()) for chosen in routings) / ROUTINGS
    return Case(
        kernel="moe",
        shape=f"{tokens} tokens x {CHOICES} of {HELD_EXPERTS} experts, {HIDDEN} x {EXPERT_SIZE}",
        dtype="MXFP4 weights, bf16",
        num_bytes=round(busy * expert_bytes) + tokens * HIDDEN * 6,
        flops=2 * tokens * CHOICES * 3 * HIDDEN * EXPERT_SIZE,
        ceilings=[Ceiling.MEMORY, Ceiling.BF16],
        calls=[partial(run, chosen) for chosen in routings],
        check=check,
        torch_call=partial(_moe_in_torch, x, routings[0], weights, plain),
    )


def _moe_in_torch(x: Tensor, chosen: Tensor, weights: Tensor, plain: list[Tensor]) -> Tensor:
    """Sorted tokens and grouped products of dequantised bf16 weights."""
    w13, w2 = plain
    by_expert = chosen.flatten().argsort(stable=True)
    ids = torch.arange(len(w2), device=x.device)
    ends = (chosen.flatten() == ids.unsqueeze(1)).sum(1).cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(x[by_expert // CHOICES], w13.transpose(1, 2), offs=ends).float().chunk(2, dim=-1)
    hidden = F.silu(gate.clamp(max=SWIGLU_LIMIT)) * up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    outputs = F.grouped_mm(hidden.bfloat16(), w2.transpose(1, 2), offs=ends)
    outputs = torch.empty_like(outputs).index_copy(0, by_expert, outputs)
    return torch.einsum("nkd,nk->nd", outputs.float().view(len(x), CHOICES, -1), weights)


def _linear_case(name: str, shape: tuple[int, int, int], tokens: int, device: torch.device) -> Case:
    groups, outputs, inputs = shape
    copies = max(1, CACHED_BYTES // (groups * outputs * inputs))
    weights = [_fp8_weight(groups * outputs, inputs, device) for _ in range(copies)]
    x = torch.randn(tokens, groups, inputs, device=device, dtype=torch.bfloat16)
    plain = weights[0].dequantised(torch.bfloat16).view(groups, outputs, inputs)

    def check() -> float:
        few = x[:CHECKED_TOKENS]
        wanted = fp8_linear_reference(few, weights[0], quantise=False)
        got = fp8_linear(x, weights[0])[:CHECKED_TOKENS]
        return worst_error("fp8_linear", got, wanted, tolerance=TOLERANCE)

    calls: list[Call] = [partial(fp8_linear, x, weight) for weight in weights]
    return Case(
        kernel="fp8_linear",
        shape=f"{name}: {tokens} tokens, {groups} x {outputs} x {inputs}",
        dtype="FP8 weights, bf16",
        num_bytes=groups * outputs * inputs + 2 * tokens * groups * (inputs + outputs),
        flops=2 * tokens * groups * outputs * inputs,
        ceilings=[Ceiling.MEMORY, Ceiling.BF16],
        calls=calls,
        check=check,
        torch_call=lambda: torch.einsum("ngi,goi->ngo", x, plain),
        other_call=lambda: fp8_linear(x, weights[0], quantise=True),
        other="activations rounded to FP8",
    )


def _fp8_weight(rows: int, inputs: int, device: torch.device) -> Fp8Weight:
    values = torch.randint(0x7F, (rows, inputs), dtype=torch.uint8, device=device)
    values |= torch.randint_like(values, 2) << 7
    middle = 127 + round(math.log2(inputs**-0.5 / 100))
    shape = (rows // 128, inputs // 128)
    scales = torch.randint(middle - 1, middle + 2, shape, dtype=torch.uint8, device=device)
    return Fp8Weight(values.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu), rows)
