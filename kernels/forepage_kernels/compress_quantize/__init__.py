"""Close a compressor window: pool its tokens, normalise, rotate, quantise and store the entry."""

import torch
from torch import Tensor

from forepage_kernels.checks import check_tensor
from forepage_kernels.compress_quantize import reference
from forepage_kernels.errors import ShapeError
from forepage_kernels.layout import KeyPool, RowPool


def compress_quantize(
    kv: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    pool: RowPool | KeyPool,
    slots: Tensor,
    *,
    rope_dims: int,
    eps: float,
) -> None:
    """Per-channel softmax of the gate over W tokens, weighted sum, RMSNorm, RoPE; stored at `slots`.

    Shapes: kv, gate f32 [n, W, d] (gate -inf = no token there; each channel has one finite gate),
    norm_weight f32 [d], cos, sin f32 [n, rope_dims / 2], slots i64 [n] (negative = skip, else distinct).
    RoPE turns interleaved pairs of the trailing `rope_dims`; quantised keys are Hadamard-rotated after it.
    W = 1 is the sliding-window row. All fp32 until stored.
    Source: DeepSeek-V4 inference/model.py, Compressor.forward.
    """
    device = pool.bytes.device
    dims = pool.layout.dims
    check_tensor("kv", kv, dtype=torch.float32, shape=[None, None, dims], device=device)
    check_tensor("gate", gate, dtype=torch.float32, shape=kv.shape, device=device)
    check_tensor("norm_weight", norm_weight, dtype=torch.float32, shape=[dims], device=device)
    if rope_dims < 0 or rope_dims % 2 or rope_dims > dims or kv.shape[1] == 0:
        raise ShapeError(f"rope_dims: {rope_dims} of {dims} dims, {kv.shape[1]} tokens a window")
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(name, table, dtype=torch.float32, shape=[kv.shape[0], rope_dims // 2], device=device)
    check_tensor("slots", slots, dtype=torch.int64, shape=[kv.shape[0]], device=device)
    if kv.is_cuda and pool.layout.format != "fp32":
        from forepage_kernels.compress_quantize.kernel import compress_quantize as launch

        store = launch
    else:
        store = reference.compress_quantize
    store(kv, gate, norm_weight, cos, sin, pool, slots, rope_dims=rope_dims, eps=eps)
