"""The memory indexer's query side: from the model's attention inputs to queries over its own indexer keys.

One small scorer for each target c4 layer, trained beside a frozen model: the same graph as the model's
own indexer, but it predicts what the *next interval* will select. The key side is the model's stored keys,
untouched; `forepage_kernels.memory_indexer` scores them. The index computes queries here, the worker only
reads which layers to tap. Source of graph and tensor names: FlashMemory-DeepSeek-V4 (released retriever).

memory_indexer.json beside the tensors, in the model's folder if no other file is named:
    target_layers   indices into the c4 layers, ascending
    heads, rank     sizes; needed with `seed`, else checked against the tensors where given
    threshold       an entry is wanted above this probability
    seed            makes weights when there is no memory_indexer.safetensors
    calibration     budget_blocks, interval_steps, recent_tokens that the threshold was chosen for, and the
                    evidence_recall that they gave; absent where nobody calibrated
A file named by the settings may do without: its tensors say the layers, the released threshold holds.
Tensors (`indexer_tensors.py` reads them): wq_a.weight [R, D], q_norm_weight [R], wq_b.weight [H * Di, R],
weights_proj.weight [H, D] for each layer.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from forepage.errors import ModelFormatError, RequestError
from forepage.kv.geometry import KvFormat
from forepage.model.indexer_tensors import PREFIX, Shapes, read_tensors, target_layers, tensor_names
from forepage.model.norm import rms_norm
from forepage.model.rope import rotation, yarn_frequencies
from forepage.model.spec import MEMORY_INDEXER_CONFIG as CONFIG_NAME
from forepage.model.spec import ModelSpec
from forepage_kernels.layout import hadamard

WEIGHTS_NAME = "memory_indexer.safetensors"
RELEASED_THRESHOLD = 0.5
"""What the released indexer was trained and measured at. Source: FlashMemory-DeepSeek-V4 training notes."""
_FIELDS = {"target_layers", "heads", "rank", "threshold", "seed", "calibration"}
_NAMES = ("wq_a.weight", "q_norm_weight", "wq_b.weight", "weights_proj.weight")
"""Of one layer's tensors, as in `ScorerWeights`."""


@dataclass(frozen=True)
class IndexerCalibration:
    """What the threshold was chosen for, and what it gave on validation texts."""

    budget_blocks: int
    interval_steps: int
    recent_tokens: int
    evidence_recall: float  # of the worst length


@dataclass(frozen=True)
class IndexerConfig:
    """What memory_indexer.json says."""

    target_layers: tuple[int, ...]
    threshold: float
    heads: int | None
    rank: int | None
    seed: int | None
    calibration: IndexerCalibration | None = None


@dataclass(frozen=True)
class ScorerWeights:
    """One target layer's tensors, fp32."""

    wq_a: Tensor  # [R, D]
    q_norm: Tensor  # [R]
    wq_b: Tensor  # [H * Di, R]
    weights_proj: Tensor  # [H, D]


class MemoryIndexer:
    """Queries of every target layer for one token; immutable once made."""

    def __init__(
        self, spec: ModelSpec, config: IndexerConfig, tensors: Mapping[str, Tensor], *, kv_format: KvFormat
    ) -> None:
        """Raises: ModelFormatError naming a tensor that is missing, unexpected or misshapen."""
        self.target_layers = config.target_layers
        self.threshold = config.threshold
        self.hidden_size = spec.hidden_size
        self.max_position = spec.max_position
        self._index_dims = spec.index_dims
        self._norm_eps = spec.norm_eps
        self._rotates = kv_format is KvFormat.FP8
        self._scorers = _scorers(spec, config, tensors)
        self.heads = self._scorers[0].weights_proj.shape[0]
        frequencies = yarn_frequencies(spec.rope_dims, spec.compress_rope_theta, spec.yarn)
        self._frequencies = frequencies.to(self._scorers[0].wq_a.device)

    @classmethod
    def load(
        cls,
        folder: Path,
        spec: ModelSpec,
        kv_format: KvFormat,
        device: torch.device,
        file: Path | None = None,
    ) -> "MemoryIndexer":
        """Read `file`; if none is named the model folder's, or seed when it has none and names a seed.

        Raises: ModelFormatError naming the file, and the field or tensor, that is wrong.
        """
        config = read_indexer_config(folder, spec, file)
        path = file or folder / WEIGHTS_NAME
        if file is not None or path.exists():
            tensors = read_tensors(path, device, lambda shapes: _check_shapes(spec, config, shapes))
        elif config.seed is not None:
            tensors = {name: tensor.to(device) for name, tensor in seeded_tensors(spec, config).items()}
        else:
            raise ModelFormatError(f"{folder}: no {WEIGHTS_NAME}, and {CONFIG_NAME} has no seed")
        return cls(spec, config, tensors, kv_format=kv_format)

    def queries(self, hidden: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Queries and head weights of the token at `position` (0-based), ready for stored keys.

        Shapes: hidden f32 [L, D], the attention inputs (after attn_norm) at the target layers ->
        q f32 [L, H, Di] (values of bf16 precision before rotation), weights f32 [L, H].
        Raises: RequestError for another shape, values that are not finite, or a position the model
        lacks: an angle clamped to the table's end would score silently wrong.
        """
        self._check(hidden, position)
        turn = rotation(torch.tensor(position, device=hidden.device), self._frequencies)  # cos, sin [rope/2]
        queries, weights = [], []
        for x, scorer in zip(hidden.float(), self._scorers, strict=True):  # x [D]
            latent = rms_norm(x @ scorer.wq_a.T, scorer.q_norm, self._norm_eps)  # [R]
            q = (latent @ scorer.wq_b.T).view(self.heads, self._index_dims)
            queries.append(turn.apply(q.to(torch.bfloat16)))  # rounded before and after, as in serving
            weights.append((x @ scorer.weights_proj.T) * self._index_dims**-0.5 * self.heads**-0.5)
        q = torch.stack(queries).float()  # [L, H, Di]
        return (hadamard(q) if self._rotates else q), torch.stack(weights)

    def _check(self, hidden: Tensor, position: int) -> None:
        wanted = (len(self.target_layers), self.hidden_size)
        if tuple(hidden.shape) != wanted:
            raise RequestError(f"hidden: shape {list(hidden.shape)}, wanted {list(wanted)}", param="hidden")
        if not bool(torch.isfinite(hidden).all()):
            raise RequestError("hidden: holds values that are not finite", param="hidden")
        if not 0 <= position < self.max_position:
            raise RequestError(
                f"position: {position} is outside the model's 0..{self.max_position - 1}", param="position"
            )


def read_indexer_config(folder: Path, spec: ModelSpec, file: Path | None = None) -> IndexerConfig:
    """Parse memory_indexer.json beside `file`, if one is named, else in the model folder.

    Raises: ModelFormatError naming the field; or the tensor, where a named file's tensors must do instead.
    """
    if file is not None and not (file.parent / CONFIG_NAME).exists():
        layers = target_layers(file, tensor_names(file))
        valid = _target_layers(file, list(layers), len(spec.c4_layers))
        return IndexerConfig(valid, RELEASED_THRESHOLD, heads=None, rank=None, seed=None)
    path = (folder if file is None else file.parent) / CONFIG_NAME
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelFormatError(
            f"{path}: no memory indexer; put one there, or name its file in FOREPAGE_MODEL__MEMORY_INDEXER"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path}: can't read the memory indexer's config: {error}") from error
    if not isinstance(body, dict):
        raise ModelFormatError(f"{path}: must hold a JSON object")
    unknown = sorted(set(body) - _FIELDS)
    if unknown:
        raise ModelFormatError(f"{path}: {unknown[0]} is not a known field")
    threshold = body.get("threshold")
    if not isinstance(threshold, int | float) or isinstance(threshold, bool) or not 0 <= threshold <= 1:
        raise ModelFormatError(f"{path}: threshold must be a number in 0..1, got {threshold!r}")
    return IndexerConfig(
        target_layers=_target_layers(path, body.get("target_layers"), len(spec.c4_layers)),
        threshold=float(threshold),
        heads=_count(path, body, "heads"),
        rank=_count(path, body, "rank"),
        seed=_count(path, body, "seed", least=0),
        calibration=_calibration(path, body["calibration"]) if "calibration" in body else None,
    )


def seeded_tensors(spec: ModelSpec, config: IndexerConfig) -> dict[str, Tensor]:
    """Tensors of an indexer nobody trained, the same bits on every machine.

    Raises: ModelFormatError when the config lacks seed, heads or rank.
    """
    if config.seed is None or config.heads is None or config.rank is None:
        raise ModelFormatError(f"{CONFIG_NAME}: seeded weights need seed, heads and rank")
    generator = torch.Generator(device="cpu").manual_seed(config.seed)
    tensors: dict[str, Tensor] = {}
    for layer in config.target_layers:
        for name, shape in (
            ("wq_a.weight", (config.rank, spec.hidden_size)),
            ("wq_b.weight", (config.heads * spec.index_dims, config.rank)),
            ("weights_proj.weight", (config.heads, spec.hidden_size)),
        ):
            # Uniform, not normal: rand is exact integer arithmetic on every CPU.
            uniform = torch.rand(shape, generator=generator) * 2 - 1
            tensors[f"{PREFIX}.l{layer}.{name}"] = uniform * math.sqrt(3 / shape[1])
        tensors[f"{PREFIX}.l{layer}.q_norm_weight"] = torch.ones(config.rank)
    return tensors


def _scorers(
    spec: ModelSpec, config: IndexerConfig, tensors: Mapping[str, Tensor]
) -> tuple[ScorerWeights, ...]:
    """The config's layers out of `tensors`, nothing more or less; heads and rank read off the shapes."""
    _check_shapes(spec, config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return tuple(
        ScorerWeights(*(tensors[f"{PREFIX}.l{layer}.{name}"] for name in _NAMES))
        for layer in config.target_layers
    )


def _check_shapes(spec: ModelSpec, config: IndexerConfig, shapes: Shapes) -> None:
    """Raises: ModelFormatError naming a tensor that is missing, unexpected or misshapen."""
    rest = dict(shapes)
    sizes = [_check_layer(spec, f"{PREFIX}.l{layer}.", rest) for layer in config.target_layers]
    if rest:
        raise ModelFormatError(f"memory indexer: unexpected tensor {sorted(rest)[0]}")
    for what, wanted, found in (
        ("heads", config.heads, {heads for heads, _ in sizes}),
        ("rank", config.rank, {rank for _, rank in sizes}),
    ):
        if len(found) != 1 or wanted not in (None, *found):
            raise ModelFormatError(
                f"memory indexer: {what} {sorted(found)} in the tensors, {wanted} expected"
            )


def _check_layer(spec: ModelSpec, prefix: str, rest: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    """Take one layer's tensors out of `rest`; its heads and rank, which every shape agrees with."""
    found: dict[str, tuple[int, ...]] = {}
    for name in _NAMES:
        if prefix + name not in rest:
            raise ModelFormatError(f"memory indexer: tensor {prefix}{name} is missing")
        found[name] = rest.pop(prefix + name)
    rank, heads = (next(iter(found[name]), 0) for name in ("wq_a.weight", "weights_proj.weight"))
    wanted = ((rank, spec.hidden_size), (rank,), (heads * spec.index_dims, rank), (heads, spec.hidden_size))
    for name, shape in zip(_NAMES, wanted, strict=True):
        if found[name] != shape:
            raise ModelFormatError(f"memory indexer: {prefix}{name} has shape {found[name]}, wanted {shape}")
    return heads, rank


def _target_layers(path: Path, value: object, num_c4: int) -> tuple[int, ...]:
    if isinstance(value, list) and value:
        valid = {layer for layer in value if type(layer) is int and 0 <= layer < num_c4}
        if value == sorted(valid):
            return tuple(value)
    raise ModelFormatError(
        f"{path}: target_layers must list c4 indices 0..{num_c4 - 1}, ascending, got {value!r}"
    )


def _calibration(path: Path, value: object) -> IndexerCalibration:
    names = {item.name for item in fields(IndexerCalibration)}
    if not isinstance(value, dict) or set(value) != names:
        raise ModelFormatError(f"{path}: calibration must have {', '.join(sorted(names))}, got {value!r}")
    recall = value["evidence_recall"]
    if not isinstance(recall, int | float) or isinstance(recall, bool) or not 0 <= recall <= 1:
        raise ModelFormatError(f"{path}: calibration.evidence_recall must be in 0..1, got {recall!r}")
    counts = [
        _count(path, value, name, least=0) for name in ("budget_blocks", "interval_steps", "recent_tokens")
    ]
    budget, interval, recent = (count or 0 for count in counts)
    return IndexerCalibration(budget, interval, recent, float(recall))


def _count(path: Path, body: Mapping[str, object], name: str, least: int = 1) -> int | None:
    if name not in body:
        return None
    value = body[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ModelFormatError(f"{path}: {name} must be an integer >= {least}, got {value!r}")
    return value
