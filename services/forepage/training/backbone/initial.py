"""Where training starts: every parameter of the network, from one seed.

Streams begin as a plain residual path (comb near the identity, post near 1), told apart by small random
biases. The compressor's position bias is random, which lets copies form somewhat earlier than slots bound to
it; norms begin at 1.
"""

import math

import torch
from torch import Tensor

from forepage.model.spec import ModelSpec
from forepage.training.backbone.network import Backbone
from forepage.training.backbone.streams import HyperConnection

EMBEDDING_STD = 0.7
HEAD_STD = 0.02
POSITION_BIAS_STD = 0.5
OUTPUT_SCALE = 0.2
"""Of matrices that write into the streams: small at first."""
COMB_DIAGONAL = 3.0
STREAM_SCALE = 0.05
STREAM_FN_STD = 0.02


@torch.no_grad()
def initialise(network: Backbone, seed: int) -> None:
    """Fill every parameter and the hash layers' expert ids; the same values for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        parameter.copy_(_drawn(name, parameter, generator))
    for module in network.modules():
        if isinstance(module, HyperConnection):
            _residual(module, network.spec, generator)
    network.head.streams.base.fill_(-math.log(network.spec.hc_mult - 1))
    for name, buffer in network.named_buffers():
        if name.endswith("expert_ids"):
            order = torch.rand(buffer.shape[0], network.spec.num_experts, generator=generator)
            buffer.copy_(order.argsort(dim=1)[:, : buffer.shape[1]])


def _drawn(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    """By the last part of the name; matrices are normal with variance 1 / inputs."""
    kind = name.split(".")[-1]
    noise = torch.randn(parameter.shape, generator=generator)
    if kind in ("norm", "q_norm", "kv_norm", "attn_norm", "ffn_norm"):
        return torch.ones(parameter.shape)
    if kind in ("sink", "base"):
        return torch.zeros(parameter.shape)
    if kind == "embedding":
        return noise * EMBEDDING_STD
    if kind == "ape":
        return noise * POSITION_BIAS_STD
    if kind == "scale":
        return torch.full(parameter.shape, STREAM_SCALE)
    if kind == "fn":
        return noise * STREAM_FN_STD
    if name == "head.weight":
        return noise * HEAD_STD
    if kind == "w2":  # stored transposed: [experts, inputs, outputs]
        return noise * (OUTPUT_SCALE / math.sqrt(parameter.shape[1]))
    scale = OUTPUT_SCALE if kind == "wo_b" else 1.0
    return noise * (scale / math.sqrt(parameter.shape[-1]))


def _residual(site: HyperConnection, spec: ModelSpec, generator: torch.Generator) -> None:
    """pre near 1 / S, post near 1, comb near the identity."""
    count = spec.hc_mult
    noise = torch.randn(site.base.shape, generator=generator)
    pre = -math.log(count - 1) + 0.5 * noise[:count]
    post = 0.5 * noise[count : 2 * count]
    comb = COMB_DIAGONAL * torch.eye(count).flatten() + 0.2 * noise[2 * count :]
    site.base.copy_(torch.cat((pre, post, comb)))
