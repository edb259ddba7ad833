"""Every tensor of a checkpoint: official name, unquantised shape, what it is for, how ranks share it.

`weights.py` seeds from it, `checkpoint.py` checks folders against it, `forepage check` counts with it; no
torch. Names have no `model.` prefix; w1 = gate, w3 = up, w2 = down. Source: tensor index of the
DeepSeek-V4-Flash release.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from forepage.kv.geometry import C4_RATIO
from forepage.model.spec import ModelSpec

MTP_PREFIX = "mtp."


class Role(Enum):
    """What a tensor does; decides its dtype, how it may be stored, and how it is seeded."""

    MATRIX = auto()  # stored plain in the release
    FP32_MATRIX = auto()  # stored plain too, products in fp32: head, router, compressors
    LINEAR = auto()  # stored as FP8 in the release
    EXPERT = auto()  # a routed expert's: stored as MXFP4 (base models: FP8)
    EMBEDDING = auto()
    NORM = auto()
    SINK = auto()
    POSITION_BIAS = auto()
    EXPERT_BIAS = auto()
    STREAM_MATRIX = auto()
    STREAM_BASE = auto()
    STREAM_SCALE = auto()
    EXPERT_IDS = auto()


_IN_MODEL_DTYPE = {Role.MATRIX, Role.LINEAR, Role.EXPERT, Role.EMBEDDING}


def fixed_dtype(role: Role) -> str | None:
    """What a worker holds such tensors in, whatever the model's dtype; None: in the model's dtype.

    Each tensor is held in the dtype it is computed with, so nothing is converted, or held twice, later. An
    FP32_MATRIX stored in bf16 may be held so (`held_form.py`).
    """
    if role is Role.EXPERT_IDS:
        return "I64"
    return None if role in _IN_MODEL_DTYPE else "F32"


class Split(Enum):
    """How tensor-parallel ranks share a tensor: each has all of it, or its share of rows or columns."""

    NONE = auto()
    ROWS = auto()
    COLUMNS = auto()


@dataclass(frozen=True)
class WeightEntry:
    """One tensor; matrices are [out, in]. A routed expert's tensors belong to one rank, whole."""

    shape: tuple[int, ...]
    role: Role
    split: Split = Split.NONE
    expert: int | None = None


def weight_table(spec: ModelSpec) -> dict[str, WeightEntry]:
    """Name -> entry for every tensor that plain decoding uses (the MTP block's are not in it)."""
    table = {
        "embed.weight": WeightEntry((spec.vocab_size, spec.hidden_size), Role.EMBEDDING),
        "head.weight": WeightEntry((spec.vocab_size, spec.hidden_size), Role.FP32_MATRIX),
        "norm.weight": WeightEntry((spec.hidden_size,), Role.NORM),
    }
    table.update(_streams("hc_head", spec, outputs=spec.hc_mult, scales=1))
    for layer, ratio in enumerate(spec.compress_ratios):
        entries = _block(spec, ratio=ratio, hashed=layer < spec.num_hash_layers)
        table.update((f"layers.{layer}.{name}", entry) for name, entry in entries)
    return table


def mtp_table(spec: ModelSpec) -> dict[str, WeightEntry]:
    """The draft blocks' tensors, which a checkpoint holds and decoding doesn't use."""
    square = WeightEntry((spec.hidden_size, spec.hidden_size), Role.LINEAR)
    norm = WeightEntry((spec.hidden_size,), Role.NORM)
    table: dict[str, WeightEntry] = {}
    for block in range(spec.num_mtp_layers):
        prefix = f"{MTP_PREFIX}{block}."
        table.update((prefix + name, entry) for name, entry in _block(spec, ratio=0, hashed=False))
        table.update({f"{prefix}{name}.weight": square for name in ("e_proj", "h_proj")})
        table.update({f"{prefix}{name}.weight": norm for name in ("enorm", "hnorm", "norm")})
        table.update(_streams(f"{prefix}hc_head", spec, outputs=spec.hc_mult, scales=1))
    return table


def _block(spec: ModelSpec, *, ratio: int, hashed: bool) -> Iterator[tuple[str, WeightEntry]]:
    for site in ("attn", "ffn"):
        yield f"{site}_norm.weight", WeightEntry((spec.hidden_size,), Role.NORM)
        outputs = (2 + spec.hc_mult) * spec.hc_mult
        yield from _streams(f"hc_{site}", spec, outputs=outputs, scales=3).items()
    for name, entry in _attention(spec, ratio):
        yield f"attn.{name}", entry
    for name, entry in _experts(spec, hashed=hashed):
        yield f"ffn.{name}", entry


def _attention(spec: ModelSpec, ratio: int) -> Iterator[tuple[str, WeightEntry]]:
    heads_out = spec.num_heads * spec.head_dim
    groups_out = spec.o_groups * spec.o_lora_rank
    yield "wq_a.weight", _linear(spec.q_lora_rank, spec.hidden_size)
    yield "wq_b.weight", _linear(heads_out, spec.q_lora_rank, Split.ROWS)
    yield "wkv.weight", _linear(spec.head_dim, spec.hidden_size)
    yield "wo_a.weight", _linear(groups_out, heads_out // spec.o_groups, Split.ROWS)
    yield "wo_b.weight", _linear(spec.hidden_size, groups_out, Split.COLUMNS)
    yield "q_norm.weight", WeightEntry((spec.q_lora_rank,), Role.NORM)
    yield "kv_norm.weight", WeightEntry((spec.head_dim,), Role.NORM)
    yield "attn_sink", WeightEntry((spec.num_heads,), Role.SINK, Split.ROWS)
    if ratio:
        yield from _compressor("compressor", spec, ratio=ratio, dims=spec.head_dim)
    if ratio == C4_RATIO:
        yield "indexer.wq_b.weight", _linear(spec.index_heads * spec.index_dims, spec.q_lora_rank)
        yield "indexer.weights_proj.weight", WeightEntry((spec.index_heads, spec.hidden_size), Role.MATRIX)
        yield from _compressor("indexer.compressor", spec, ratio=ratio, dims=spec.index_dims)


def _compressor(name: str, spec: ModelSpec, *, ratio: int, dims: int) -> Iterator[tuple[str, WeightEntry]]:
    width = 2 * dims if ratio == C4_RATIO else dims
    yield f"{name}.wkv.weight", WeightEntry((width, spec.hidden_size), Role.FP32_MATRIX)
    yield f"{name}.wgate.weight", WeightEntry((width, spec.hidden_size), Role.FP32_MATRIX)
    yield f"{name}.norm.weight", WeightEntry((dims,), Role.NORM)
    yield f"{name}.ape", WeightEntry((ratio, width), Role.POSITION_BIAS)


def _experts(spec: ModelSpec, *, hashed: bool) -> Iterator[tuple[str, WeightEntry]]:
    yield "gate.weight", WeightEntry((spec.num_experts, spec.hidden_size), Role.FP32_MATRIX)
    if hashed:
        yield "gate.tid2eid", WeightEntry((spec.vocab_size, spec.experts_per_token), Role.EXPERT_IDS)
    else:
        yield "gate.bias", WeightEntry((spec.num_experts,), Role.EXPERT_BIAS)
    up, down = (spec.expert_size, spec.hidden_size), (spec.hidden_size, spec.expert_size)
    for matrix, shape in (("w1", up), ("w2", down), ("w3", up)):
        yield f"shared_experts.{matrix}.weight", _linear(*shape)
        for expert in range(spec.num_experts):
            yield f"experts.{expert}.{matrix}.weight", WeightEntry(shape, Role.EXPERT, expert=expert)


def _streams(prefix: str, spec: ModelSpec, *, outputs: int, scales: int) -> dict[str, WeightEntry]:
    return {
        f"{prefix}_fn": WeightEntry((outputs, spec.hc_mult * spec.hidden_size), Role.STREAM_MATRIX),
        f"{prefix}_base": WeightEntry((outputs,), Role.STREAM_BASE),
        f"{prefix}_scale": WeightEntry((scales,), Role.STREAM_SCALE),
    }


def _linear(outputs: int, inputs: int, split: Split = Split.NONE) -> WeightEntry:
    return WeightEntry((outputs, inputs), Role.LINEAR, split)
