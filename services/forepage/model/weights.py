"""A model folder's weights as a dict from official tensor name to tensor: loaded or made from a seed.

Loading takes official checkpoints (FP8, MXFP4) and plain ones, strictly: every tensor of the table, no
other, each of the right shape and dtype. Quantised ones become plain tensors, or keep their form: then
`X.weight` has the values and `X.scale` the scales. Each is made in the form and at the place it is used in
(`held_form.py`, `fused_names`), so a model of them converts and copies nothing.
Seeded weights are the same bits on every machine: they are built from uniform fp32 draws of torch's CPU
generator, tensor by tensor in name order, with exact arithmetic after that.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from forepage.errors import ModelFormatError
from forepage.model.checkpoint import Checkpoint, has_index
from forepage.model.checkpoint import weight_files as weight_files  # also what a fingerprint covers
from forepage.model.checkpoint_reader import TORCH_DTYPES, CheckpointReader
from forepage.model.held_form import HeldForm
from forepage.model.load_progress import shown_loading
from forepage.model.spec import ModelSpec
from forepage.model.stored_form import StoredTensor, scale_name, stored_parts
from forepage.model.tensor_parallel import rank_spans
from forepage.model.weight_table import Role, WeightEntry, weight_table

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


_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def load_or_seed(
    folder: Path,
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    keep_stored: bool = False,
    rank: int = 0,
    num_ranks: int = 1,
) -> dict[str, Tensor]:
    """Load the folder's checkpoint, or seed when it has none and its config names a seed.

    Plain matrices are held in `dtype`; quantised ones too, or with `keep_stored` as they are. Of several
    ranks each gets its own part (`rank_span`; `check_split` must hold).

    Raises: ModelFormatError naming the tensor and file that is missing, unexpected, misshapen, of a wrong
    dtype or truncated, or `forepage_seed` when there are neither weights nor a seed.
    """
    if weight_files(folder) or has_index(folder):
        checkpoint = Checkpoint.open(folder, spec)
        form = HeldForm(_DTYPE_NAMES[dtype], keep_stored)
        return load_checkpoint(checkpoint, spec, form=form, device=device, rank=rank, num_ranks=num_ranks)
    if spec.seed is None:
        raise ModelFormatError(f"{folder}: no *.safetensors, and config.json has no forepage_seed")
    return seeded_weights(spec, spec.seed, dtype=dtype, device=device, rank=rank, num_ranks=num_ranks)


def load_checkpoint(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    *,
    form: HeldForm,
    device: torch.device,
    rank: int = 0,
    num_ranks: int = 1,
) -> dict[str, Tensor]:
    """Read the rank's part of every tensor, file by file in the order of the data, straight into its place.

    What the model fuses (`fused_names`) lies side by side in one storage, so that fusing it again is a
    view. Memory: the result and one tile. Raises: ModelFormatError, as `load_or_seed`, for tensors to be
    fused that are in different forms, and for what can't be computed with as stored (`read_stored_into`).
    """
    table = weight_table(spec)
    spans = rank_spans(spec, rank=rank, num_ranks=num_ranks)
    files = checkpoint.tensors
    held = {
        name: dict(form.parts(name, table[name], files[name].stored.dtype, span))
        for name, span in spans.items()
    }
    weights = _allocate(spec, held, device=device)
    reader = CheckpointReader(checkpoint, spec)
    part_bytes = {
        name: sum(
            part.num_bytes for _, part in stored_parts(name, table[name], files[name].stored.dtype, span)
        )
        for name, span in spans.items()
    }
    places = {name: (tensor.path, tensor.offset) for name, tensor in files.items()}
    with shown_loading(sum(part_bytes.values())) as advance:
        for name in sorted(spans, key=places.__getitem__):
            span, scales = spans[name], weights.get(scale_name(name))
            if scales is None:
                reader.read_into(weights[name], name, rows=span.rows, columns=span.columns)
            else:
                reader.read_stored_into(weights[name], scales, name, span)
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
    form, table = HeldForm(_DTYPE_NAMES[dtype]), weight_table(spec)
    spans = rank_spans(spec, rank=rank, num_ranks=num_ranks)
    held = {name: dict(form.parts(name, table[name], None, span)) for name, span in spans.items()}
    weights = _allocate(spec, held, device=device)
    for name, entry in sorted(table.items()):
        drawn = _draw(entry, spec, generator)
        if name in spans:
            rows, columns = spans[name].rows, spans[name].columns
            weights[name].copy_(drawn[rows, columns] if drawn.dim() == 2 else drawn[rows])
    return weights


def _allocate(
    spec: ModelSpec, held: Mapping[str, Mapping[str, StoredTensor]], *, device: torch.device
) -> dict[str, Tensor]:
    """Empty tensors by name, those of a fused group as views of one; `held`: what is held of each tensor."""
    weights: dict[str, Tensor] = {}
    table = weight_table(spec)
    for group in fused_names(spec):
        names = [name for name in group if name in held]
        _check_alike(names, held, table)
        for each in zip(*(held[name].items() for name in names), strict=True):
            parts = [part for part, _ in each]
            together = _empty(each[0][1], device, count=len(parts))
            weights.update(zip(parts, together.unbind(), strict=True))
    for parts_of_one in held.values():
        for part, tensor in parts_of_one.items():
            if part not in weights:
                weights[part] = _empty(tensor, device, count=1).squeeze(0)
    return weights


def _check_alike(
    names: list[str], held: Mapping[str, Mapping[str, StoredTensor]], table: Mapping[str, WeightEntry]
) -> None:
    """Raises: ModelFormatError when some of a group are held as stored and others are not."""
    forms = [list(held[name].values()) for name in names]
    for name, form in zip(names, forms, strict=True):
        if form != forms[0]:
            is_plain = table[name].role is Role.FP32_MATRIX
            raise ModelFormatError(
                f"{name} is stored in another form than {names[0]}, with which it is computed: "
                f"set FOREPAGE_MODEL__WEIGHT_DTYPE to {'fp32' if is_plain else 'bf16 or fp32'}"
            )


def _empty(tensor: StoredTensor, device: torch.device, *, count: int) -> Tensor:
    return torch.empty((count, *tensor.shape), dtype=TORCH_DTYPES[tensor.dtype], device=device)


def _draw(entry: WeightEntry, spec: ModelSpec, generator: torch.Generator) -> Tensor:
    """One seeded tensor, fp32 (expert ids i64)."""
    if entry.role is Role.EXPERT_IDS:
        order = torch.rand(entry.shape[0], spec.num_experts, generator=generator)  # [vocab, E]
        return order.sort(dim=-1, stable=True).indices[:, : entry.shape[1]].contiguous()
    mean, std = _SPREAD.get(entry.role, (0.0, 1 / math.sqrt(entry.shape[-1])))
    # Uniform, not normal: rand is exact integer arithmetic, randn's polynomials differ between CPUs.
    uniform = torch.rand(entry.shape, generator=generator) * 2 - 1
    return uniform * (math.sqrt(3) * std) + mean
