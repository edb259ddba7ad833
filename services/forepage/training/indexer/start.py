"""First weights of an indexer: random, or the model's own indexers, which then want what they select now.

Native weights are spread over the wider form without changing a score: the latent is repeated, so its norm
stays, only its first copy is read, and heads that the model lacks begin with no say.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from forepage.errors import ModelFormatError, RequestError
from forepage.model.indexer_tensors import PREFIX
from forepage.model.memory_indexer import IndexerConfig, seeded_tensors
from forepage.model.safetensors_file import read_file
from forepage.model.spec import ModelSpec
from forepage.model.weights import weight_files
from forepage.training.indexer.config import FitConfig, Start

NATIVE = {
    "wq_a": "attn.wq_a.weight",
    "q_norm": "attn.q_norm.weight",
    "wq_b": "attn.indexer.wq_b.weight",
    "weights_proj": "attn.indexer.weights_proj.weight",
}


def first_tensors(
    spec: ModelSpec, fit: FitConfig, target_layers: Sequence[int], model: Path | None
) -> dict[str, Tensor]:
    """By released name, fp32, on the CPU.

    Raises: RequestError where native weights are asked for without a model, or don't fit heads and rank;
    ModelFormatError naming a tensor that the model's files lack.
    """
    layers = tuple(target_layers)
    config = IndexerConfig(layers, threshold=0.5, heads=fit.heads, rank=fit.rank, seed=fit.seed)
    tensors = seeded_tensors(spec, config)
    if fit.start is Start.RANDOM:
        return tensors
    if model is None:
        raise RequestError("start = native needs the model's folder, for its indexers' weights", "start")
    if fit.rank % spec.q_lora_rank or fit.heads < spec.index_heads:
        raise RequestError(
            f"start = native: rank a multiple of {spec.q_lora_rank}, at least {spec.index_heads} heads",
            "rank",
        )
    for layer in layers:
        native = _native(model, spec.c4_layers[layer])
        tensors |= {
            f"{PREFIX}.l{layer}.{name}": value
            for name, value in spread(native, tensors, spec, fit, layer).items()
        }
    return tensors


def spread(
    native: dict[str, Tensor], drawn: dict[str, Tensor], spec: ModelSpec, fit: FitConfig, layer: int
) -> dict[str, Tensor]:
    """One layer's native tensors as those of an indexer of more heads and a higher rank, scores unchanged."""
    copies = fit.rank // spec.q_lora_rank
    rows = spec.index_heads * spec.index_dims
    wq_b = drawn[f"{PREFIX}.l{layer}.wq_b.weight"].clone()
    wq_b[:rows] = 0
    wq_b[:rows, : spec.q_lora_rank] = native["wq_b"]
    weights = torch.zeros(fit.heads, spec.hidden_size)
    # The scale has 1 / sqrt(heads): more of them would weaken those that speak.
    weights[: spec.index_heads] = native["weights_proj"] * (fit.heads / spec.index_heads) ** 0.5
    return {
        "wq_a.weight": native["wq_a"].repeat(copies, 1),
        "q_norm_weight": native["q_norm"].repeat(copies),
        "wq_b.weight": wq_b,
        "weights_proj.weight": weights,
    }


def _native(model: Path, layer: int) -> dict[str, Tensor]:
    """The four tensors of one layer, all that is read. Plain dtypes: not from an FP8 checkpoint."""
    wanted = {f"layers.{layer}.{name}": short for short, name in NATIVE.items()}
    found: dict[str, Tensor] = {}
    for path in weight_files(model):
        tensors = read_file(path, names=wanted)
        found |= {wanted[name]: tensor.float() for name, tensor in tensors.items()}
    for name, short in wanted.items():
        if short not in found:
            raise ModelFormatError(f"{model}: tensor {name} is missing")
    return found
