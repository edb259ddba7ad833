"""One TOML file says everything about a training run; this turns it into checked values. No torch.

Raises everywhere: RequestError naming the field.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from forepage.errors import RequestError
from forepage.model.spec import ModelSpec
from forepage.suites.registry import MIN_TOKENS, SUITES

Moments = Literal["float32", "bfloat16", "none"]
STRICT = ConfigDict(extra="forbid", strict=True)
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
T = TypeVar("T")


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Where texts come from: a seed, and how often each suite is drawn, relative to the others."""

    seed: Natural
    workers: Natural
    suites: dict[str, Weight]


@dataclass(frozen=True, config=STRICT)
class StageConfig:
    """A part of the curriculum: documents of one length, packed into steps of so many tokens.

    It takes `share` of the run's time, or `steps` where that is given. `records` is the share of documents
    that are records; the others are the suites'. `rest_weight` is the loss weight of what is no answer,
    `decisive_weight` that of an answer's tokens that the right part of the context decides; others have 1.
    """

    name: str
    length: Count
    tokens: Count
    share: Weight
    steps: Count | None
    records: Share
    rest_weight: Weight
    decisive_weight: Positive
    fp8_rows: bool


@dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """Muon on matrices, AdamW on the rest."""

    muon_lr: Positive
    muon_momentum: Share
    muon_weight_decay: Weight
    adam_lr: Positive
    adam_betas: tuple[Share, Share]
    warmup_steps: Natural
    decay_from: Share  # share of the run's time after which both rates fall linearly
    final_lr: Share  # share of the rate at the end
    clip: Positive
    balance_rate: Weight  # how fast the experts' selection biases follow their load


@dataclass(frozen=True, config=STRICT)
class IndexerConfig:
    """The Lightning Indexers' dense warm-up after the backbone: at the rates of [optimizer], falling to 0.

    It takes `minutes`, or `steps` where that is given. `cut`, `floor` and `flatness` make the target, in the
    sparse stage too.
    """

    length: Count
    tokens: Count
    rows: Annotated[int, Field(ge=2)]  # tokens of a step that are learned from
    records: Share
    clip: Positive
    minutes: Weight
    steps: Count | None
    cut: Share  # share of a token's attention above which an entry is something that was looked up
    floor: Positive  # weight of all other entries together
    flatness: Share  # exponent of their shares: 0 is flat, 1 as attended


@dataclass(frozen=True, config=STRICT)
class SparseConfig:
    """The last stage: c4 layers attend what their indexers choose; backbone and indexers are both trained.

    It takes `minutes`, or `steps` where that is given. Rates are those of [optimizer] times the factors here,
    with its warm-up and decay; the loss weighs tokens as the last stage of the curriculum does.
    """

    length: Count
    tokens: Count
    rows: Annotated[int, Field(ge=2)]  # tokens of a step that the indexers learn from
    records: Share
    minutes: Weight
    steps: Count | None
    backbone_rate: Positive
    indexer_rate: Positive


@dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
    """After training: teacher-forced exact match of the test split's answers."""

    lengths: Annotated[tuple[Count, ...], Field(min_length=1)]
    tokens: Count
    steps: Count
    seed: Natural


@dataclass(frozen=True, config=STRICT | ConfigDict(arbitrary_types_allowed=True))
class TrainingConfig:
    """A whole run."""

    seed: Natural
    minutes: Weight
    moments: Moments  # how a checkpoint keeps the optimisers' moments
    model: dict[str, Any]
    spec: ModelSpec
    data: DataConfig
    optimizer: OptimizerConfig
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)]
    indexer: IndexerConfig
    sparse: SparseConfig
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
        """Check a parsed file. Raises: ModelFormatError too, naming the field of [model]."""
        model = _part(raw, "model")
        stages = raw.get("stage", ())
        config = _made(
            cls,
            {name: value for name, value in raw.items() if name != "stage"}
            | {
                "spec": ModelSpec.from_config(model),
                "data": _made(DataConfig, _part(raw, "data"), "data"),
                "optimizer": _made(OptimizerConfig, _part(raw, "optimizer"), "optimizer"),
                "stages": tuple(_made(StageConfig, {"steps": None} | stage, "stage") for stage in stages),
                "indexer": _made(IndexerConfig, {"steps": None} | _part(raw, "indexer"), "indexer"),
                "sparse": _made(SparseConfig, {"steps": None} | _part(raw, "sparse"), "sparse"),
                "evaluation": _made(EvaluationConfig, _part(raw, "evaluation"), "evaluation"),
            },
        )
        _check(config)
        return config


def _part(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(raw.get(name), dict):
        raise RequestError(f"config: [{name}] is missing", name)
    part: dict[str, Any] = raw[name]
    return part


def _made(kind: type[T], fields: Mapping[str, Any], section: str = "") -> T:
    """The section as its type; TOML's lists are tuples here."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        where = f"[{section}] {name}" if section else name
        raise RequestError(f"config: {where}: {first['msg']}", name) from error


def _check(config: TrainingConfig) -> None:
    """What several fields must keep together."""
    for stage in config.stages:
        _check_fits(f"stage {stage.name}", stage.length, stage.tokens)
        if stage.steps is None and not config.minutes * stage.share:
            raise RequestError(f"config: stage {stage.name}: neither steps nor a share of minutes", "share")
    _check_fits("[indexer]", config.indexer.length, config.indexer.tokens)
    _check_fits("[sparse]", config.sparse.length, config.sparse.tokens)
    for length in config.evaluation.lengths:
        _check_fits("[evaluation] lengths", length, config.evaluation.tokens)
    suites = config.data.suites
    unknown = sorted(set(suites) - set(SUITES))
    if unknown:
        raise RequestError(f"config: [data] suites: there is no {unknown[0]}", "suites")
    if suites and not any(suites.values()):
        raise RequestError("config: [data] suites: all of them are 0", "suites")


def _check_fits(where: str, length: int, tokens: int) -> None:
    if length % MIN_TOKENS or tokens % length:
        message = f"config: {where}: length must be a multiple of {MIN_TOKENS} that divides tokens"
        raise RequestError(message, "length")
