"""What a model folder's config.json says, checked once and turned into numbers; no torch.

Everything else in `model/` takes a `ModelSpec` and never looks at the config again. A config of another
architecture, or one with a feature this implementation lacks, is refused by the field's name.
Field names and meanings: DeepSeek-V4 `config.json` (Flash and Pro).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from forepage.errors import ModelFormatError
from forepage.kv.geometry import C4_RATIO, C128_RATIO

MODEL_TYPE = "deepseek_v4"
DSPARK_PREFIX = "dspark_"
_FIXED: dict[str, object] = {
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
}
"""Fields with one implemented value."""


@dataclass(frozen=True)
class YarnScaling:
    """YaRN of the layers with a compressor; cos and sin carry no extra factor."""

    factor: float
    original_max_position: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True)
class ModelSpec:
    """The numbers of one model; Flash's values as examples."""

    vocab_size: int  # 129,280
    hidden_size: int  # 4,096
    num_layers: int  # 43
    num_heads: int  # 64
    head_dim: int  # 512: the rope dims are the trailing ones
    rope_dims: int  # 64
    q_lora_rank: int  # 1,024
    o_groups: int  # 8
    o_lora_rank: int  # 1,024, per group
    window_tokens: int  # 128
    compress_ratios: tuple[int, ...]  # per layer: 0, 4 or 128
    index_heads: int  # 64
    index_dims: int  # 128
    index_topk: int  # 512
    rope_theta: float  # 10,000: layers of ratio 0
    compress_rope_theta: float  # 160,000: all other layers
    yarn: YarnScaling
    max_position: int  # 1,048,576
    num_experts: int  # 256
    experts_per_token: int  # 6
    expert_size: int  # 2,048
    num_hash_layers: int  # 3
    routed_scale: float  # 1.5
    swiglu_limit: float  # 10
    hc_mult: int  # 4
    hc_sinkhorn_iters: int  # 20
    hc_eps: float  # 1e-6
    norm_eps: float  # 1e-6
    num_mtp_layers: int  # 1; their tensors are not used
    seed: int | None  # only ours: weights come from this seed when the folder has none

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> "ModelSpec":
        """Read an official config. Raises: ModelFormatError naming the field that is missing or unknown."""
        _refuse_other_models(config)
        read = _Fields(config)
        spec = cls(
            vocab_size=read.count("vocab_size"),
            hidden_size=read.count("hidden_size"),
            num_layers=read.count("num_hidden_layers"),
            num_heads=read.count("num_attention_heads"),
            head_dim=read.count("head_dim"),
            rope_dims=read.count("qk_rope_head_dim"),
            q_lora_rank=read.count("q_lora_rank"),
            o_groups=read.count("o_groups"),
            o_lora_rank=read.count("o_lora_rank"),
            window_tokens=read.count("sliding_window"),
            compress_ratios=_compress_ratios(config, read.count("num_hidden_layers")),
            index_heads=read.count("index_n_heads"),
            index_dims=read.count("index_head_dim"),
            index_topk=read.count("index_topk"),
            rope_theta=read.number("rope_theta"),
            compress_rope_theta=read.number("compress_rope_theta"),
            yarn=_yarn(config),
            max_position=read.count("max_position_embeddings"),
            num_experts=read.count("n_routed_experts"),
            experts_per_token=read.count("num_experts_per_tok"),
            expert_size=read.count("moe_intermediate_size"),
            num_hash_layers=read.count("num_hash_layers", least=0),
            routed_scale=read.number("routed_scaling_factor"),
            swiglu_limit=read.number("swiglu_limit"),
            hc_mult=read.count("hc_mult"),
            hc_sinkhorn_iters=read.count("hc_sinkhorn_iters"),
            hc_eps=read.number("hc_eps"),
            norm_eps=read.number("rms_norm_eps"),
            num_mtp_layers=read.count("num_nextn_predict_layers", least=0),
            seed=read.count("forepage_seed", least=0) if "forepage_seed" in config else None,
        )
        _check_sizes(spec)
        return spec

    @property
    def c4_layers(self) -> tuple[int, ...]:
        """Layers with an indexer, ascending; an index into this tuple is a "c4 index"."""
        return tuple(i for i, ratio in enumerate(self.compress_ratios) if ratio == C4_RATIO)

    @property
    def c128_layers(self) -> tuple[int, ...]:
        """Layers that attend one row per 128 tokens, all of them."""
        return tuple(i for i, ratio in enumerate(self.compress_ratios) if ratio == C128_RATIO)


MEMORY_INDEXER_CONFIG = "memory_indexer.json"
"""Beside config.json: what the memory indexer is (`memory_indexer`)."""


def served_name(folder: Path, config: Mapping[str, object]) -> str:
    """What clients call the model of this folder."""
    return str(config.get("forepage_name") or folder.name)


def read_config(folder: Path) -> dict[str, object]:
    """Parse `folder`/config.json. Raises: ModelFormatError when absent or not a JSON object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path}: can't read the model's config: {error}") from error
    if not isinstance(config, dict):
        raise ModelFormatError(f"{path}: must hold a JSON object")
    return config


class _Fields:
    """Typed reads of a config; each failure names the field."""

    def __init__(self, config: Mapping[str, object], prefix: str = "") -> None:
        self._config = config
        self._prefix = prefix

    def count(self, name: str, least: int = 1) -> int:
        value = self._get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ModelFormatError(
                f"config: {self._prefix}{name} must be an integer >= {least}, got {value!r}"
            )
        return value

    def number(self, name: str) -> float:
        value = self._get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ModelFormatError(f"config: {self._prefix}{name} must be a positive number, got {value!r}")
        return float(value)

    def _get(self, name: str) -> object:
        if name not in self._config:
            raise ModelFormatError(f"config: {self._prefix}{name} is missing")
        return self._config[name]


def _refuse_other_models(config: Mapping[str, object]) -> None:
    model_type = config.get("model_type")
    if model_type == "deepseek_v41":
        raise ModelFormatError(
            "config: model_type 'deepseek_v41' (DeepSeek-V4.1) is not supported: its attention is another "
            "(KV shared across layers, two-level top-k, Engram)"
        )
    if model_type != MODEL_TYPE:
        raise ModelFormatError(f"config: model_type {model_type!r} is not supported, only {MODEL_TYPE!r}")
    drafter = sorted(name for name in config if name.startswith(DSPARK_PREFIX))
    if drafter:
        raise ModelFormatError(f"config: {drafter[0]}: checkpoints with a DSpark drafter are not supported")
    for name, value in _FIXED.items():
        if name not in config:
            raise ModelFormatError(f"config: {name} is missing")
        if config[name] != value:
            raise ModelFormatError(f"config: {name} {config[name]!r} is not supported, only {value!r}")


def _compress_ratios(config: Mapping[str, object], num_layers: int) -> tuple[int, ...]:
    ratios = config.get("compress_ratios")
    if not isinstance(ratios, list | tuple) or len(ratios) < num_layers:
        raise ModelFormatError(f"config: compress_ratios must list at least {num_layers} layers")
    unknown = [ratio for ratio in ratios if ratio not in (0, C4_RATIO, C128_RATIO)]
    if unknown:
        raise ModelFormatError(f"config: compress_ratios has {unknown[0]!r}; only 0, 4 and 128 are known")
    return tuple(ratios[:num_layers])


def _yarn(config: Mapping[str, object]) -> YarnScaling:
    scaling = config.get("rope_scaling")
    if not isinstance(scaling, dict):
        raise ModelFormatError(f"config: rope_scaling must be an object, got {scaling!r}")
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind != "yarn":
        raise ModelFormatError(f"config: rope_scaling.type {kind!r} is not supported, only 'yarn'")
    read = _Fields(scaling, "rope_scaling.")
    return YarnScaling(
        factor=read.number("factor"),
        original_max_position=read.count("original_max_position_embeddings"),
        beta_fast=read.number("beta_fast"),
        beta_slow=read.number("beta_slow"),
    )


def _check_sizes(spec: ModelSpec) -> None:
    """Relations between fields that the maths relies on."""
    index_dims = spec.index_dims
    for bad, message in (
        (
            spec.rope_dims % 2 or spec.rope_dims >= spec.head_dim,
            "qk_rope_head_dim must be even and < head_dim",
        ),
        (spec.rope_dims > index_dims, "index_head_dim must be at least qk_rope_head_dim"),
        (index_dims & (index_dims - 1), "index_head_dim must be a power of two"),
        (spec.num_heads % spec.o_groups, "o_groups must divide num_attention_heads"),
        (spec.experts_per_token > spec.num_experts, "num_experts_per_tok must be at most n_routed_experts"),
    ):
        if bad:
            raise ModelFormatError(f"config: {message}")
