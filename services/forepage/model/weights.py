"""A model folder's weights as a dict from official tensor name to tensor: loaded or made from a seed.

Loading takes official checkpoints (FP8, MXFP4) and plain ones, strictly: every tensor of the table, no
other, each of the right shape and dtype; for now all become plain tensors of the model's dtype. Seeded
weights are the same bits on every machine: they are built from uniform fp32 draws of torch's CPU
generator, tensor by tensor in name order, with exact arithmetic after that.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from forepage.errors import ModelFormatError
from forepage.model.checkpoint import Checkpoint, has_index
from forepage.model.checkpoint import weight_files as weight_files  # also what a fingerprint covers
from forepage.model.checkpoint_reader import CheckpointReader
from forepage.model.load_progress import shown_loading
from forepage.model.spec import ModelSpec
from forepage.model.stored_form import scale_name
from forepage.model.weight_table import Role, WeightEntry, weight_table

_MODEL_DTYPE_ROLES = {Role.MATRIX, Role.LINEAR, Role.EXPERT, Role.EMBEDDING, Role.NORM}
_SPREAD: dict[Role, tuple[float, float]] = {
    Role.EMBEDDING: (0.0, 1.0),
    Role.NORM: (1.0, 0.2),
    Role.SINK: (0.0, 1.0),
    Role.POSITION_BIAS: (0.0, 0.5),
    Role.EXPERT_BIAS: (0.0, 0.1),
    Role.STREAM_BASE: (0.0, 1.0),
    Role.STREAM_SCALE: (1.0, 0.2),
}
"""Mean and standard deviation of seeded tensors; matrices get 1/sqrt(inputs), so activations stay near 1."""


def load_or_seed(
    folder: Path, spec: ModelSpec, *, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Load the folder's checkpoint, or seed when it has none and its config names a seed.

    Raises: ModelFormatError naming the tensor and file that is missing, unexpected, misshapen, of a wrong
    dtype or truncated, or `forepage_seed` when there are neither weights nor a seed.
    """
    if weight_files(folder) or has_index(folder):
        return load_checkpoint(Checkpoint.open(folder, spec), spec, dtype=dtype, device=device)
    if spec.seed is None:
        raise ModelFormatError(f"{folder}: no *.safetensors, and config.json has no forepage_seed")
    return seeded_weights(spec, spec.seed, dtype=dtype, device=device)


def load_checkpoint(
    checkpoint: Checkpoint, spec: ModelSpec, *, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Read every tensor of the table, file by file in the order of its data, dequantised in place.

    What the model fuses (`fused_names`) lies side by side in one storage, so that fusing it again is a
    view. Memory: the result and one tile. Raises: ModelFormatError, as `load_or_seed`.
    """
    table = weight_table(spec)
    weights = _allocate(spec, table, dtype=dtype, device=device)
    reader = CheckpointReader(checkpoint, spec)
    stored_bytes = {name: tensor.stored.num_bytes for name, tensor in checkpoint.tensors.items()}
    places = {name: (tensor.path, tensor.offset) for name, tensor in checkpoint.tensors.items()}
    with shown_loading(checkpoint.num_bytes) as advance:
        for name in sorted(table, key=places.__getitem__):
            reader.read_into(weights[name], name)
            advance(checkpoint.tensors[name].path, stored_bytes[name] + stored_bytes.get(scale_name(name), 0))
    return weights


def fused_names(spec: ModelSpec) -> list[list[str]]:
    """Tensors that the model uses as one, in its order: per layer the experts' w1 and w3 in turn,
    their w2, and the shared expert's w1 and w3.
    """
    groups = []
    for layer in range(spec.num_layers):
        prefix = f"layers.{layer}.ffn."
        experts = [f"{prefix}experts.{expert}" for expert in range(spec.num_experts)]
        groups.append([f"{expert}.{matrix}.weight" for expert in experts for matrix in ("w1", "w3")])
        groups.append([f"{expert}.w2.weight" for expert in experts])
        groups.append([f"{prefix}shared_experts.{matrix}.weight" for matrix in ("w1", "w3")])
    return groups


def side_by_side(tensors: list[Tensor]) -> Tensor:
    """Tensors of one shape as one [n, ...]: a view where they lie in one storage in order, else a copy."""
    first = tensors[0]
    step = first.numel() * first.element_size()
    storage = first.untyped_storage().data_ptr()
    together = all(
        tensor.shape == first.shape
        and tensor.is_contiguous()
        and tensor.untyped_storage().data_ptr() == storage
        and tensor.data_ptr() == first.data_ptr() + idx * step
        for idx, tensor in enumerate(tensors)
    )
    if not together:
        return torch.stack(tensors)
    return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))


def seeded_weights(
    spec: ModelSpec, seed: int, *, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Weights of a model nobody trained: every tensor non-zero, logits of about unit scale."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return {
        name: _draw(entry, spec, generator).to(device=device, dtype=_dtype(entry, dtype))
        for name, entry in sorted(weight_table(spec).items())
    }


def _allocate(
    spec: ModelSpec, table: dict[str, WeightEntry], *, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Empty tensors by name, those of a fused group as views of one."""
    weights: dict[str, Tensor] = {}
    for names in fused_names(spec):
        shape = (len(names), *table[names[0]].shape)
        group = torch.empty(shape, dtype=_dtype(table[names[0]], dtype), device=device)
        weights.update(zip(names, group.unbind(), strict=True))
    for name, entry in table.items():
        if name not in weights:
            weights[name] = torch.empty(entry.shape, dtype=_dtype(entry, dtype), device=device)
    return weights


def _dtype(entry: WeightEntry, model_dtype: torch.dtype) -> torch.dtype:
    """Matrices, embeddings and norms have the model's dtype; small parameters stay fp32, ids i64."""
    if entry.role is Role.EXPERT_IDS:
        return torch.int64
    return model_dtype if entry.role in _MODEL_DTYPE_ROLES else torch.float32


def _draw(entry: WeightEntry, spec: ModelSpec, generator: torch.Generator) -> Tensor:
    """One seeded tensor, fp32 (expert ids i64)."""
    if entry.role is Role.EXPERT_IDS:
        order = torch.rand(entry.shape[0], spec.num_experts, generator=generator)  # [vocab, E]
        return order.sort(dim=-1, stable=True).indices[:, : entry.shape[1]].contiguous()
    mean, std = _SPREAD.get(entry.role, (0.0, 1 / math.sqrt(entry.shape[-1])))
    # Uniform, not normal: rand is exact integer arithmetic, randn's polynomials differ between CPUs.
    uniform = torch.rand(entry.shape, generator=generator) * 2 - 1
    return uniform * (math.sqrt(3) * std) + mean
