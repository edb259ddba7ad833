"""A model folder's weights as a dict from official tensor name to tensor: loaded or made from a seed.

Loading takes official checkpoints (FP8, MXFP4) and plain ones, strictly: every tensor of the table, no
other, each of the right shape and dtype; for now all become plain tensors. Each is made in the dtype and
at the place it is used in (`fixed_dtype`, `fused_names`), so a model of them converts and copies nothing.
Seeded weights are the same bits on every machine: they are built from uniform fp32 draws of torch's CPU
generator, tensor by tensor in name order, with exact arithmetic after that.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from forepage.errors import ModelFormatError
from forepage.model.checkpoint import Checkpoint, has_index
from forepage.model.checkpoint import weight_files as weight_files  # also what a fingerprint covers
from forepage.model.checkpoint_reader import TORCH_DTYPES, CheckpointReader
from forepage.model.load_progress import shown_loading
from forepage.model.spec import ModelSpec
from forepage.model.stored_form import Span, stored_parts
from forepage.model.tensor_parallel import rank_spans
from forepage.model.weight_table import Role, WeightEntry, fixed_dtype, weight_table

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
    folder: Path,
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    rank: int = 0,
    num_ranks: int = 1,
) -> dict[str, Tensor]:
    """Load the folder's checkpoint, or seed when it has none and its config names a seed.

    Of several ranks each gets its own part (`rank_span`; `check_split` must hold).

    Raises: ModelFormatError naming the tensor and file that is missing, unexpected, misshapen, of a wrong
    dtype or truncated, or `forepage_seed` when there are neither weights nor a seed.
    """
    if weight_files(folder) or has_index(folder):
        checkpoint = Checkpoint.open(folder, spec)
        return load_checkpoint(checkpoint, spec, dtype=dtype, device=device, rank=rank, num_ranks=num_ranks)
    if spec.seed is None:
        raise ModelFormatError(f"{folder}: no *.safetensors, and config.json has no forepage_seed")
    return seeded_weights(spec, spec.seed, dtype=dtype, device=device, rank=rank, num_ranks=num_ranks)


def load_checkpoint(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    rank: int = 0,
    num_ranks: int = 1,
) -> dict[str, Tensor]:
    """Read the rank's part of every tensor, file by file in the order of the data, dequantised in place.

    What the model fuses (`fused_names`) lies side by side in one storage, so that fusing it again is a
    view. Memory: the result and one tile. Raises: ModelFormatError, as `load_or_seed`.
    """
    table = weight_table(spec)
    spans = rank_spans(spec, rank=rank, num_ranks=num_ranks)
    weights = _allocate(spec, spans, dtype=dtype, device=device)
    reader = CheckpointReader(checkpoint, spec)
    files = checkpoint.tensors
    part_bytes = {
        name: sum(
            part.num_bytes for _, part in stored_parts(name, table[name], files[name].stored.dtype, span)
        )
        for name, span in spans.items()
    }
    places = {name: (tensor.path, tensor.offset) for name, tensor in files.items()}
    with shown_loading(sum(part_bytes.values())) as advance:
        for name in sorted(spans, key=places.__getitem__):
            reader.read_into(weights[name], name, rows=spans[name].rows, columns=spans[name].columns)
            if table[name].role is Role.EXPERT_IDS:
                _check_ids(weights[name], spec, f"{files[name].path}: {name}")
            advance(files[name].path, part_bytes[name])
    return weights


def _check_ids(ids: Tensor, spec: ModelSpec, where: str) -> None:
    """Raises: ModelFormatError for an expert that the model lacks: a step would be the first to notice."""
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= spec.num_experts:
        wrong = least if least < 0 else most
        raise ModelFormatError(f"{where} names expert {wrong}, the model has {spec.num_experts}")


def fused_names(spec: ModelSpec) -> list[list[str]]:
    """Tensors that the model uses as one, in its order: per layer the experts' w1 and w3 in turn,
    their w2, the shared expert's w1 and w3, and each compressor's wkv and wgate.
    """
    table = weight_table(spec)
    groups = []
    for layer in range(spec.num_layers):
        prefix = f"layers.{layer}.ffn."
        experts = [f"{prefix}experts.{expert}" for expert in range(spec.num_experts)]
        groups.append([f"{expert}.{matrix}.weight" for expert in experts for matrix in ("w1", "w3")])
        groups.append([f"{expert}.w2.weight" for expert in experts])
        groups.append([f"{prefix}shared_experts.{matrix}.weight" for matrix in ("w1", "w3")])
        for part in ("compressor", "indexer.compressor"):
            pair = [f"layers.{layer}.attn.{part}.{matrix}.weight" for matrix in ("wkv", "wgate")]
            if pair[0] in table:
                groups.append(pair)
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
    spec: ModelSpec,
    seed: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    rank: int = 0,
    num_ranks: int = 1,
) -> dict[str, Tensor]:
    """Weights of a model nobody trained: every tensor non-zero, logits of about unit scale.

    Each rank draws all of them, one by one, and keeps its part.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    spans = rank_spans(spec, rank=rank, num_ranks=num_ranks)
    weights = _allocate(spec, spans, dtype=dtype, device=device)
    for name, entry in sorted(weight_table(spec).items()):
        drawn = _draw(entry, spec, generator)
        if name in spans:
            rows, columns = spans[name].rows, spans[name].columns
            weights[name].copy_(drawn[rows, columns] if drawn.dim() == 2 else drawn[rows])
    return weights


def _allocate(
    spec: ModelSpec, spans: dict[str, Span], *, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Empty tensors of these parts by name, those of a fused group as views of one."""
    table = weight_table(spec)
    weights: dict[str, Tensor] = {}
    for group in fused_names(spec):
        names = [name for name in group if name in spans]
        entry = table[names[0]]
        shape = (len(names), *spans[names[0]].shape(len(entry.shape)))
        together = torch.empty(shape, dtype=_dtype(entry, dtype), device=device)
        weights.update(zip(names, together.unbind(), strict=True))
    for name, span in spans.items():
        if name not in weights:
            shape = span.shape(len(table[name].shape))
            weights[name] = torch.empty(shape, dtype=_dtype(table[name], dtype), device=device)
    return weights


def _dtype(entry: WeightEntry, model_dtype: torch.dtype) -> torch.dtype:
    fixed = fixed_dtype(entry.role)
    return model_dtype if fixed is None else TORCH_DTYPES[fixed]


def _draw(entry: WeightEntry, spec: ModelSpec, generator: torch.Generator) -> Tensor:
    """One seeded tensor, fp32 (expert ids i64)."""
    if entry.role is Role.EXPERT_IDS:
        order = torch.rand(entry.shape[0], spec.num_experts, generator=generator)  # [vocab, E]
        return order.sort(dim=-1, stable=True).indices[:, : entry.shape[1]].contiguous()
    mean, std = _SPREAD.get(entry.role, (0.0, 1 / math.sqrt(entry.shape[-1])))
    # Uniform, not normal: rand is exact integer arithmetic, randn's polynomials differ between CPUs.
    uniform = torch.rand(entry.shape, generator=generator) * 2 - 1
    return uniform * (math.sqrt(3) * std) + mean
