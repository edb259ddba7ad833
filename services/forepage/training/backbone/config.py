"""One TOML file says everything about a training run; this turns it into checked values. No torch.

Raises everywhere: RequestError naming the field.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from forepage.errors import RequestError
from forepage.model.spec import ModelSpec
from forepage.suites.registry import MIN_TOKENS, SUITES

MOMENTS = ("float32", "bfloat16", "none")
T = TypeVar("T")


@dataclass(frozen=True)
class DataConfig:
    """Where texts come from: a seed, and how often each suite is drawn, relative to the others."""

    seed: int
    workers: int
    suites: Mapping[str, float]


@dataclass(frozen=True)
class StageConfig:
    """A part of the curriculum: documents of one length, packed into steps of so many tokens.

    It takes `share` of the run's time, or `steps` where that is given. `records` is the share of documents
    that are records; the others are the suites'. `rest_weight` is the loss weight of what is no answer,
    `decisive_weight` that of an answer's tokens that the right part of the context decides; others have 1.
    """

    name: str
    length: int
    tokens: int
    share: float
    steps: int | None
    records: float
    rest_weight: float
    decisive_weight: float
    fp8_rows: bool


@dataclass(frozen=True)
class OptimizerConfig:
    """Muon on matrices, AdamW on the rest."""

    muon_lr: float
    muon_momentum: float
    muon_weight_decay: float
    adam_lr: float
    adam_betas: tuple[float, float]
    warmup_steps: int
    decay_from: float  # share of the run's time after which both rates fall linearly
    final_lr: float  # share of the rate at the end
    clip: float
    balance_rate: float  # how fast the experts' selection biases follow their load


@dataclass(frozen=True)
class IndexerConfig:
    """The Lightning Indexers' dense warm-up after the backbone: at the rates of [optimizer], falling to 0."""

    length: int
    tokens: int
    rows: int  # tokens of a step that are learned from
    records: float
    clip: float
    minutes: float
    cut: float  # share of a token's attention above which an entry is something that was looked up
    floor: float  # weight of all other entries together
    flatness: float  # exponent of their shares: 0 is flat, 1 as attended


@dataclass(frozen=True)
class EvaluationConfig:
    """After training: teacher-forced exact match of the test split's answers."""

    lengths: tuple[int, ...]
    tokens: int
    steps: int
    seed: int


@dataclass(frozen=True)
class TrainingConfig:
    """A whole run."""

    seed: int
    minutes: float
    moments: str  # how a checkpoint keeps the optimisers' moments: one of MOMENTS
    model: Mapping[str, Any]
    spec: ModelSpec
    data: DataConfig
    optimizer: OptimizerConfig
    stages: tuple[StageConfig, ...]
    indexer: IndexerConfig
    evaluation: EvaluationConfig

    @classmethod
    def read(cls, path: Path) -> "TrainingConfig":
        """Read and check a file."""
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RequestError(f"{path}: {error}", "config") from error
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "TrainingConfig":
        """Check a parsed file."""
        optimizer = dict(_part(raw, "optimizer"))
        optimizer["adam_betas"] = tuple(optimizer.get("adam_betas", ()))
        evaluation = dict(_part(raw, "evaluation"))
        evaluation["lengths"] = tuple(evaluation.get("lengths", ()))
        model = _part(raw, "model")
        config = cls(
            seed=int(raw.get("seed", 0)),
            minutes=float(raw.get("minutes", 0)),
            moments=str(raw.get("moments", MOMENTS[0])),
            model=model,
            spec=ModelSpec.from_config(model),
            data=_made(DataConfig, _part(raw, "data")),
            optimizer=_made(OptimizerConfig, optimizer),
            stages=tuple(_made(StageConfig, {"steps": None} | stage) for stage in raw.get("stage", ())),
            indexer=_made(IndexerConfig, _part(raw, "indexer")),
            evaluation=_made(EvaluationConfig, evaluation),
        )
        _check(config)
        return config


def _part(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if not isinstance(raw.get(name), dict):
        raise RequestError(f"config: [{name}] is missing", name)
    part: Mapping[str, Any] = raw[name]
    return part


def _made(kind: type[T], fields: Mapping[str, Any]) -> T:
    try:
        return kind(**fields)
    except TypeError as error:
        raise RequestError(f"config: {error}", kind.__name__) from error


def _check(config: TrainingConfig) -> None:
    if config.moments not in MOMENTS:
        raise RequestError(f"config: moments must be one of {', '.join(MOMENTS)}", "moments")
    if not config.stages:
        raise RequestError("config: no [[stage]]", "stage")
    for stage in config.stages:
        if stage.tokens % stage.length or stage.length % MIN_TOKENS:
            message = (
                f"config: stage {stage.name}: length must be a multiple of {MIN_TOKENS} that divides tokens"
            )
            raise RequestError(message, "length")
    unknown = sorted(set(config.data.suites) - set(SUITES))
    if unknown:
        raise RequestError(f"config: data.suites: there is no {unknown[0]}", "suites")
