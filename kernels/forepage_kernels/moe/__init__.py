"""Routed experts with MXFP4 weights as stored: gate and up, clamped SwiGLU, down, weighted sum."""

import torch
from torch import Tensor

from forepage_kernels.checks import check_tensor
from forepage_kernels.errors import ShapeError
from forepage_kernels.moe import reference
from forepage_kernels.moe.experts import Fp4Experts as Fp4Experts
from forepage_kernels.mxfp4 import MX_GROUP


def moe(x: Tensor, chosen: Tensor, weights: Tensor, experts: Fp4Experts, *, limit: float) -> Tensor:
    """Sum over a token's chosen experts of weight * w2 (silu(min(w1 x, limit)) * clamp(w3 x, -limit, limit)).

    Shapes: x f32|bf16 [n, D], chosen i64 [n, k] ids over all ranks, weights f32 [n, k] -> f32 [n, D].
    Experts of other ranks add nothing. What is between the two products, and each expert's output, is in
    x's dtype; sums are fp32, in the order of `chosen`. A token's result does not depend on the others.
    Nothing is read back to the host and shapes come from the arguments, so calls can be captured.
    Source: DeepSeek-V4 inference/model.py, Expert and MoE.
    """
    check_tensor("x", x, dtype=(torch.float32, torch.bfloat16), shape=[None, experts.width])
    check_tensor("chosen", chosen, dtype=torch.int64, shape=[x.shape[0], None], device=x.device)
    check_tensor("weights", weights, dtype=torch.float32, shape=chosen.shape, device=x.device)
    _check_experts(experts, x.device)
    if x.is_cuda and x.dtype == torch.bfloat16:
        from forepage_kernels.moe.kernel import moe as launch

        return launch(x, chosen, weights, experts, limit=limit)
    return reference.moe(x, chosen, weights, experts, limit=limit)


def _check_experts(experts: Fp4Experts, device: torch.device) -> None:
    num, size, width = experts.w13.shape[0], experts.size, experts.width
    if size % MX_GROUP or width % MX_GROUP:
        raise ShapeError(f"experts: {size} x {width} are not multiples of {MX_GROUP}")
    for name, tensor, rows, columns in (
        ("w13", experts.w13, 2 * size, width // 2),
        ("w13_scales", experts.w13_scales, 2 * size, width // MX_GROUP),
        ("w2", experts.w2, width, size // 2),
        ("w2_scales", experts.w2_scales, width, size // MX_GROUP),
    ):
        check_tensor(name, tensor, dtype=torch.uint8, shape=[num, rows, columns], device=device)
