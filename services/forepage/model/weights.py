"""A model folder's weights as a dict from official tensor name to tensor: loaded or made from a seed.

Loading takes plain (unquantised) safetensors only and is strict: every tensor of the table, no other,
each of the right shape. Seeded weights are the same bits on every machine: they are built from uniform
fp32 draws of torch's CPU generator, tensor by tensor in name order, with exact arithmetic after that.
"""

import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from forepage.errors import ModelFormatError
from forepage.model.spec import ModelSpec
from forepage.model.weight_table import Role, WeightEntry, weight_table

MTP_PREFIX = "mtp."
MEMORY_INDEXER_FILE = "memory_indexer.safetensors"
_PLAIN_DTYPES = {"BF16", "F16", "F32", "I64"}
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
    """Load the folder's safetensors, or seed when it has none and its config names a seed.

    Raises: ModelFormatError naming the tensor and file that is missing, unexpected, misshapen or
    quantised, or `forepage_seed` when there are neither weights nor a seed.
    """
    files = weight_files(folder)
    if files:
        return load_safetensors(files, spec, dtype=dtype, device=device)
    if spec.seed is None:
        raise ModelFormatError(f"{folder}: no *.safetensors, and config.json has no forepage_seed")
    return seeded_weights(spec, spec.seed, dtype=dtype, device=device)


def weight_files(folder: Path) -> list[Path]:
    """The backbone's files: every *.safetensors but the memory indexer's."""
    return [path for path in sorted(folder.glob("*.safetensors")) if path.name != MEMORY_INDEXER_FILE]


def seeded_weights(
    spec: ModelSpec, seed: int, *, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Weights of a model nobody trained: every tensor non-zero, logits of about unit scale."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return {
        name: _draw(entry, spec, generator).to(device=device, dtype=entry.role.dtype(dtype))
        for name, entry in sorted(weight_table(spec).items())
    }


def load_safetensors(
    files: list[Path], spec: ModelSpec, *, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Read every tensor of the table from `files`. Raises: ModelFormatError, see `load_or_seed`."""
    table = weight_table(spec)
    weights: dict[str, Tensor] = {}
    for path in files:
        try:
            _load_file(path, spec, table, weights)
        except (OSError, SafetensorError) as error:
            raise ModelFormatError(f"{path}: can't read: {error}") from error
    missing = sorted(table.keys() - weights.keys())
    if missing:
        raise ModelFormatError(f"{files[0].parent}: {len(missing)} tensors are missing, first {missing[0]}")
    return {
        name: weights[name].to(device=device, dtype=entry.role.dtype(dtype))
        for name, entry in sorted(table.items())
    }


def _load_file(
    path: Path, spec: ModelSpec, table: dict[str, WeightEntry], weights: dict[str, Tensor]
) -> None:
    """Add one file's tensors to `weights`, checking each header before its data is read."""
    with safe_open(path, framework="pt", device="cpu") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a mapping)
            if spec.num_mtp_layers and name.startswith(MTP_PREFIX):
                continue
            header = tensors.get_slice(name)
            if header.get_dtype() not in _PLAIN_DTYPES:
                raise ModelFormatError(
                    f"{path}: {name} is {header.get_dtype()}: quantised checkpoints are not supported yet"
                )
            if name not in table:
                raise ModelFormatError(f"{path}: unexpected tensor {name}")
            if name in weights:
                raise ModelFormatError(f"{path}: {name} is in another file too")
            shape = tuple(header.get_shape())
            if shape != table[name].shape:
                raise ModelFormatError(f"{path}: {name} has shape {shape}, not {table[name].shape}")
            if (header.get_dtype() == "I64") != (table[name].role is Role.EXPERT_IDS):
                raise ModelFormatError(f"{path}: {name} has dtype {header.get_dtype()}")
            weights[name] = tensors.get_tensor(name)


def _draw(entry: WeightEntry, spec: ModelSpec, generator: torch.Generator) -> Tensor:
    """One seeded tensor, fp32 (expert ids i64)."""
    if entry.role is Role.EXPERT_IDS:
        order = torch.rand(entry.shape[0], spec.num_experts, generator=generator)  # [vocab, E]
        return order.sort(dim=-1, stable=True).indices[:, : entry.shape[1]].contiguous()
    mean, std = _SPREAD.get(entry.role, (0.0, 1 / math.sqrt(entry.shape[-1])))
    # Uniform, not normal: rand is exact integer arithmetic, randn's polynomials differ between CPUs.
    uniform = torch.rand(entry.shape, generator=generator) * 2 - 1
    return uniform * (math.sqrt(3) * std) + mean
