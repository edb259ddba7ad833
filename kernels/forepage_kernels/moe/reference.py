"""Plain torch moe: expert by expert, dequantised whole, products in fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from forepage_kernels.moe.experts import Fp4Experts
from forepage_kernels.mxfp4 import decode_mxfp4


def moe(x: Tensor, chosen: Tensor, weights: Tensor, experts: Fp4Experts, *, limit: float) -> Tensor:
    """See the package."""
    out = x.new_zeros(x.shape, dtype=torch.float32)
    for expert in range(experts.w13.shape[0]):
        tokens, places = (chosen == experts.first + expert).nonzero(as_tuple=True)
        if tokens.shape[0] == 0:
            continue
        w13 = decode_mxfp4(experts.w13[expert], experts.w13_scales[expert])
        w2 = decode_mxfp4(experts.w2[expert], experts.w2_scales[expert])
        gate, up = F.linear(x[tokens].float(), w13).chunk(2, dim=-1)
        hidden = F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
        output = F.linear(hidden.to(x.dtype).float(), w2).to(x.dtype)
        out.index_add_(0, tokens, output.float() * weights[tokens, places].unsqueeze(1))
    return out
