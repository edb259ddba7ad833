"""Every tensor of a checkpoint: official name, unquantised shape and what it is for.

`weights.py` seeds from it and checks loaded folders against it. Names have no `model.` prefix;
w1 = gate, w3 = up, w2 = down. Source: tensor index of the DeepSeek-V4-Flash release.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

import torch

from forepage.kv.geometry import C4_RATIO
from forepage.model.spec import ModelSpec


class Role(Enum):
    """What a tensor does; decides its dtype and how it is seeded."""

    MATRIX = auto()
    EMBEDDING = auto()
    NORM = auto()
    SINK = auto()
    POSITION_BIAS = auto()
    EXPERT_BIAS = auto()
    STREAM_MATRIX = auto()
    STREAM_BASE = auto()
    STREAM_SCALE = auto()
    EXPERT_IDS = auto()

    def dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Matrices, embeddings and norms have the model's dtype; small parameters stay fp32, ids i64."""
        if self is Role.EXPERT_IDS:
            return torch.int64
        return model_dtype if self in (Role.MATRIX, Role.EMBEDDING, Role.NORM) else torch.float32


@dataclass(frozen=True)
class WeightEntry:
    """Shape and role of one tensor; matrices are [out, in]."""

    shape: tuple[int, ...]
    role: Role


def weight_table(spec: ModelSpec) -> dict[str, WeightEntry]:
    """Name -> entry for every tensor that plain decoding uses (the MTP block's are not in it)."""
    table = {
        "embed.weight": WeightEntry((spec.vocab_size, spec.hidden_size), Role.EMBEDDING),
        "head.weight": WeightEntry((spec.vocab_size, spec.hidden_size), Role.MATRIX),
        "norm.weight": WeightEntry((spec.hidden_size,), Role.NORM),
    }
    table.update(_streams("hc_head", spec, outputs=spec.hc_mult, scales=1))
    for layer in range(spec.num_layers):
        prefix = f"layers.{layer}."
        table.update((prefix + name, entry) for name, entry in _layer(spec, layer))
    return table


def _layer(spec: ModelSpec, layer: int) -> Iterator[tuple[str, WeightEntry]]:
    for site in ("attn", "ffn"):
        yield f"{site}_norm.weight", WeightEntry((spec.hidden_size,), Role.NORM)
        outputs = (2 + spec.hc_mult) * spec.hc_mult
        yield from _streams(f"hc_{site}", spec, outputs=outputs, scales=3).items()
    for name, entry in _attention(spec, spec.compress_ratios[layer]):
        yield f"attn.{name}", entry
    for name, entry in _experts(spec, hashed=layer < spec.num_hash_layers):
        yield f"ffn.{name}", entry


def _attention(spec: ModelSpec, ratio: int) -> Iterator[tuple[str, WeightEntry]]:
    heads_out = spec.num_heads * spec.head_dim
    groups_out = spec.o_groups * spec.o_lora_rank
    yield "wq_a.weight", _matrix(spec.q_lora_rank, spec.hidden_size)
    yield "wq_b.weight", _matrix(heads_out, spec.q_lora_rank)
    yield "wkv.weight", _matrix(spec.head_dim, spec.hidden_size)
    yield "wo_a.weight", _matrix(groups_out, heads_out // spec.o_groups)
    yield "wo_b.weight", _matrix(spec.hidden_size, groups_out)
    yield "q_norm.weight", WeightEntry((spec.q_lora_rank,), Role.NORM)
    yield "kv_norm.weight", WeightEntry((spec.head_dim,), Role.NORM)
    yield "attn_sink", WeightEntry((spec.num_heads,), Role.SINK)
    if ratio:
        yield from _compressor("compressor", spec, ratio=ratio, dims=spec.head_dim)
    if ratio == C4_RATIO:
        yield "indexer.wq_b.weight", _matrix(spec.index_heads * spec.index_dims, spec.q_lora_rank)
        yield "indexer.weights_proj.weight", _matrix(spec.index_heads, spec.hidden_size)
        yield from _compressor("indexer.compressor", spec, ratio=ratio, dims=spec.index_dims)


def _compressor(name: str, spec: ModelSpec, *, ratio: int, dims: int) -> Iterator[tuple[str, WeightEntry]]:
    width = 2 * dims if ratio == C4_RATIO else dims
    yield f"{name}.wkv.weight", _matrix(width, spec.hidden_size)
    yield f"{name}.wgate.weight", _matrix(width, spec.hidden_size)
    yield f"{name}.norm.weight", WeightEntry((dims,), Role.NORM)
    yield f"{name}.ape", WeightEntry((ratio, width), Role.POSITION_BIAS)


def _experts(spec: ModelSpec, *, hashed: bool) -> Iterator[tuple[str, WeightEntry]]:
    yield "gate.weight", _matrix(spec.num_experts, spec.hidden_size)
    if hashed:
        yield "gate.tid2eid", WeightEntry((spec.vocab_size, spec.experts_per_token), Role.EXPERT_IDS)
    else:
        yield "gate.bias", WeightEntry((spec.num_experts,), Role.EXPERT_BIAS)
    for expert in ("shared_experts", *(f"experts.{e}" for e in range(spec.num_experts))):
        yield f"{expert}.w1.weight", _matrix(spec.expert_size, spec.hidden_size)
        yield f"{expert}.w2.weight", _matrix(spec.hidden_size, spec.expert_size)
        yield f"{expert}.w3.weight", _matrix(spec.expert_size, spec.hidden_size)


def _streams(prefix: str, spec: ModelSpec, *, outputs: int, scales: int) -> dict[str, WeightEntry]:
    return {
        f"{prefix}_fn": WeightEntry((outputs, spec.hc_mult * spec.hidden_size), Role.STREAM_MATRIX),
        f"{prefix}_base": WeightEntry((outputs,), Role.STREAM_BASE),
        f"{prefix}_scale": WeightEntry((scales,), Role.STREAM_SCALE),
    }


def _matrix(outputs: int, inputs: int) -> WeightEntry:
    return WeightEntry((outputs, inputs), Role.MATRIX)
