"""How much GPU memory a step of the sparse stage takes at most, told before it begins.

What autograd keeps of a token is counted in a small forward pass on the CPU, uncompiled: a compiler keeps
less, no copies in other types above all. On a GPU attention keeps no matrix of tokens by rows; the choice,
scores and the indexers' sample are added by their shapes.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from forepage.kv.geometry import C4_RATIO
from forepage.model.spec import ModelSpec
from forepage.training.backbone.config import TrainingConfig
from forepage.training.backbone.initial import initialise
from forepage.training.backbone.network import Backbone, Inputs
from forepage.training.backbone.packing import DOCUMENT_STEP, Packing
from forepage.training.backbone.selection import TILE_SCORES

STATE_BYTES = 16
"""Of a parameter at most: master, gradient and two moments, fp32."""
SCORE_COPIES = 4
"""Of a tile of scores: themselves, and what the choice of the best makes of them."""
SAMPLE_COPIES = 4
"""Of [R, P] a head: products, what is kept of them, and their gradients."""
BACKWARD_SHARE = 0.25
"""Gradients that live at once, of what the forward pass has kept: about a layer's, taken twice."""


@dataclass(frozen=True)
class StepMemory:
    """In bytes."""

    state: int  # parameters, gradients and moments
    activations: int
    choices: int  # bool [n, P] of every c4 layer
    scores: int  # tiles of [tokens, P]
    sample: int  # what the indexers learn from
    gradients: int

    @property
    def total(self) -> int:
        """All at once."""
        return sum(getattr(self, field.name) for field in fields(self))


def sparse_step_memory(config: TrainingConfig, dtype: torch.dtype = torch.bfloat16) -> StepMemory:
    """Of a step of [sparse] with activations of this type."""
    spec, plan = config.spec, config.sparse
    kept, num_parameters = _probed(spec, dtype)
    layers, places = len(spec.c4_layers), plan.tokens // C4_RATIO
    activations = kept * plan.tokens
    return StepMemory(
        state=STATE_BYTES * num_parameters,
        activations=activations,
        choices=layers * plan.tokens * places,
        scores=SCORE_COPIES * 4 * min(TILE_SCORES, plan.tokens * plan.length // C4_RATIO),
        sample=SAMPLE_COPIES * 4 * layers * spec.index_heads * plan.rows * places,
        gradients=int(BACKWARD_SHARE * activations),
    )


def memory_text(config: TrainingConfig) -> str:
    """For people."""
    step = sparse_step_memory(config)
    parts = ", ".join(f"{field.name} {getattr(step, field.name) / 1e9:.1f}" for field in fields(step))
    return f"a step of {config.sparse.tokens} tokens takes at most about {step.total / 1e9:.0f} GB ({parts})"


def _probed(spec: ModelSpec, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that the forward pass keeps of a token, and how many parameters there are."""
    device, num_tokens = torch.device("cpu"), DOCUMENT_STEP
    network = Backbone(spec, dtype=dtype, device=device)
    initialise(network, 0)
    packing = Packing(num_tokens, spec.compress_ratios, window_tokens=spec.window_tokens, device=device)
    inputs = Inputs.empty(num_tokens, device)
    known = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    matrix = packing.places + num_tokens
    kept: dict[int, Tensor] = {}  # held, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in known and (not tensor.dim() or tensor.shape[-1] != matrix):
            kept[address] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        streams, _ = network(inputs, packing)
        network.head.losses(streams, inputs.targets)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return total // num_tokens, sum(parameter.numel() for parameter in network.parameters())
