"""One TOML file says everything about a model's memory indexer: its dump, its training, its calibration.

Raises everywhere: RequestError naming the field. No torch.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from forepage.errors import RequestError
from forepage.suites.registry import MIN_TOKENS, SUITES

T = TypeVar("T")


class LabelRule(StrEnum):
    """Which entries of the coming steps a plan should have."""

    VOTE = "vote"  # in the mass sets of `min_layers` c4 layers at one step: the released rule
    UNION = "union"  # in the mass set of any c4 layer at any step
    EVIDENCE = "evidence"  # evidence of any c4 layer at any step: what the audit counts
    OWN_LAYER = "own_layer"  # evidence of the target layer itself: each has labels of its own


class Granularity(StrEnum):
    """What gets a label: an entry, or a block by its best entry, as a plan picks them."""

    ENTRY = "entry"
    BLOCK = "block"


class Loss(StrEnum):
    """`focal`: yes or no per candidate. `mass`: KL from the coming steps' mass to the scores' softmax."""

    FOCAL = "focal"
    MASS = "mass"


class Start(StrEnum):
    """Where weights begin."""

    RANDOM = "random"
    NATIVE = "native"  # the model's own indexers: at first it wants what the present token selects


@dataclass(frozen=True)
class DumpConfig:
    """Which texts the backbone reads, and what is kept of each."""

    seed: int
    lengths: tuple[int, ...]
    texts: tuple[int, ...]  # how many of each length
    validation_share: float
    rows: int  # most rows of a text
    mass: float  # of the mass sets that are kept
    target_layers: tuple[int, ...]  # c4 indices whose hidden states and keys are kept
    suites: Mapping[str, float]  # how often, relative to each other


@dataclass(frozen=True)
class LabelConfig:
    """What is to be predicted."""

    rule: LabelRule
    granularity: Granularity
    mass: float  # of vote and union; at most the dump's
    min_layers: int  # of vote


@dataclass(frozen=True)
class FitConfig:
    """The dual encoder and how it is trained."""

    seed: int
    heads: int
    rank: int
    start: Start
    loss: Loss
    steps: int
    texts_per_step: int
    rows: int  # plans a text and step
    first_share: float  # of them made at the last token of a question
    lr: float
    weight_decay: float
    warmup_steps: int
    clip: float
    gamma: float
    positive_weight: float
    hard_negatives: int  # a plan's own highest wrong candidates; blocks at block granularity
    random_negatives: int  # shared by the plans of a text
    mine_from: int  # steps before mining begins
    joint_share: float  # of the loss, on the maximum over layers as served; the rest is each layer's own
    entry_share: float  # at block granularity: of the loss, on the blocks' entries one by one
    jitter_share: float  # of plans whose query is moved away from the keys
    jitter_tokens: int  # at most so far
    validate_every: int
    cache_bytes: int  # of texts kept on the device
    store_bf16: bool


@dataclass(frozen=True)
class CalibrationConfig:
    """What to reach with the fewest blocks."""

    evidence_recall: float
    budgets: tuple[int, ...]
    least_layers: int
    most_layers: int


@dataclass(frozen=True)
class IndexerTrainingConfig:
    """The whole file. `interval` and `recent_tokens` are the worker's `interval_steps`, `recent_tokens`."""

    interval: int
    recent_tokens: int
    model: Mapping[str, Any] | None  # a config.json, for features without a model
    dump: DumpConfig
    label: LabelConfig
    fit: FitConfig
    calibration: CalibrationConfig

    @classmethod
    def read(cls, path: Path) -> "IndexerTrainingConfig":
        """Read and check a file."""
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RequestError(f"{path}: {error}", "config") from error
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "IndexerTrainingConfig":
        """Check a parsed file."""
        config = cls(
            interval=int(raw.get("interval", 0)),
            recent_tokens=int(raw.get("recent_tokens", -1)),
            model=raw.get("model"),
            dump=_made(DumpConfig, raw, "dump"),
            label=_made(LabelConfig, raw, "label"),
            fit=_made(FitConfig, raw, "fit"),
            calibration=_made(CalibrationConfig, raw, "calibration"),
        )
        _check(config)
        return config


def _made(kind: type[T], raw: Mapping[str, Any], name: str) -> T:
    part = raw.get(name)
    if not isinstance(part, dict):
        raise RequestError(f"config: [{name}] is missing", name)
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in part.items()}
    try:
        for item in fields(kind):  # type: ignore[arg-type]
            if isinstance(item.type, type) and issubclass(item.type, StrEnum) and item.name in values:
                values[item.name] = item.type(str(values[item.name]))
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise RequestError(f"config: [{name}]: {error}", name) from error


def _check(config: IndexerTrainingConfig) -> None:
    dump, label, fit = config.dump, config.label, config.fit
    for wrong, message, name in (
        (config.interval < 1, "must be at least 1", "interval"),
        (config.recent_tokens < 0, "must be at least 0", "recent_tokens"),
        (not dump.lengths or len(dump.lengths) != len(dump.texts), "as many as lengths", "texts"),
        (any(length < MIN_TOKENS for length in dump.lengths), f"at least {MIN_TOKENS} tokens", "lengths"),
        (not 0 < dump.validation_share <= 0.5, "must lie in 0..0.5", "validation_share"),
        (not 0 < dump.mass <= 1, "must lie in 0..1", "mass"),
        (not 0 < label.mass <= dump.mass, "must lie in 0..the dump's", "mass"),
        (label.min_layers < 1, "must be at least 1", "min_layers"),
        (fit.steps < 1 or fit.rows < 1 or fit.texts_per_step < 1, "must be at least 1", "steps"),
        (not 0 <= fit.joint_share <= 1, "must lie in 0..1", "joint_share"),
        (not 0 <= fit.entry_share <= 1, "must lie in 0..1", "entry_share"),
        (bool(set(dump.suites) - set(SUITES)), "unknown suite", "suites"),
        (not 0 < config.calibration.evidence_recall <= 1, "must lie in 0..1", "evidence_recall"),
        (
            label.rule is LabelRule.OWN_LAYER and fit.joint_share > 0,
            "layers with labels of their own have no joint loss",
            "joint_share",
        ),
    ):
        if wrong:
            raise RequestError(f"config: {name}: {message}", name)
