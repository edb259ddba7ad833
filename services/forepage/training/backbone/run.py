"""`forepage train backbone`: train or resume, export, score, report."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from forepage.errors import RequestError
from forepage.training.backbone.batch_stream import BatchStream
from forepage.training.backbone.config import TrainingConfig
from forepage.training.backbone.evaluation import Evaluation, Score, free_memory
from forepage.training.backbone.indexer_training import IndexerTraining
from forepage.training.backbone.journal import Journal, journal
from forepage.training.backbone.official import export
from forepage.training.backbone.report import CURVE_FILE, can_draw, write_report
from forepage.training.backbone.sparse_training import SparseTraining
from forepage.training.backbone.trainer import Budget, Trainer
from forepage.training.results import forget_peak

EXPORT_FOLDER = "export"


@dataclass(frozen=True)
class Order:
    """What one call is to do."""

    config: TrainingConfig
    folder: Path
    begin_at: Path | None = None  # exported weights to begin at, where there is no checkpoint
    only_sparse: bool = False  # leave out curriculum and warm-up: the sparse stage, on those weights
    minutes: float | None = (
        None  # training stops so long after the call began; None: when the stages are done
    )
    steps: int | None = None
    indexer: bool = False  # train the indexers even when the backbone is not done
    evaluate: bool = True
    device: str | None = None


def run(order: Order) -> bool:
    """Whether all stages are done. All is written to `order.folder`, exported weights to its `export`."""
    began = time.monotonic()
    torch.set_float32_matmul_precision("high")
    device = torch.device(order.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = order.config
    deadline = began + order.minutes * 60 if order.minutes is not None else float("inf")
    minutes = (0.0 if order.only_sparse else config.minutes) + config.sparse.minutes
    with journal(order.folder, minutes * 60) as notes, BatchStream(config.data) as stream:
        trainer = Trainer(config, order.folder, device, begin_at=order.begin_at)
        sparse = SparseTraining(trainer.network, config, order.folder)
        count = sum(parameter.numel() for parameter in trainer.network.parameters())
        notes.note(f"{count:,} parameters; at {sparse.progress if sparse.begun else trainer.progress}")
        if not can_draw():
            notes.note(f"matplotlib is not installed: there will be no {CURVE_FILE}")
        done = _train(order, trainer, sparse, stream, notes, deadline)
        export(trainer.network, config.model, order.folder / EXPORT_FOLDER)
        notes.note(f"exported after {time.monotonic() - began:.0f} s")
        free_memory()
        scores = _scored(trainer, notes, sparse=sparse.begun) if order.evaluate else []
    raw = {"model": dict(config.model), "seed": config.seed, "minutes": config.minutes}
    plans = {"warm-up": asdict(config.indexer), "sparse": asdict(config.sparse)}
    write_report(order.folder, {"backbone": raw, **plans}, scores)
    return done


def _train(  # the order of a run, to be read in one place
    order: Order,
    trainer: Trainer,
    sparse: SparseTraining,
    stream: BatchStream,
    notes: Journal,
    deadline: float,
) -> bool:
    """Curriculum, warm-up, sparse stage, from wherever the folder stands; whether all is done."""
    forget_peak()
    if not sparse.begun and order.only_sparse:
        if order.begin_at is None and not trainer.resumed:
            raise RequestError("the sparse stage alone needs weights: --begin-at", "begin_at")
        sparse.begin(trainer.progress)
    if not sparse.begun:
        done = trainer.train(stream, notes, Budget(deadline, order.steps))
        if done or order.indexer:
            _warm_up(trainer, stream, notes)
        if done:
            # First of the two: who finds it is past the warm-up, which begins anew where it was cut off.
            sparse.begin(trainer.progress)
        if done or order.indexer:
            trainer.save()
        if not done:
            return False
    forget_peak()
    left = None if order.steps is None else order.steps - trainer.steps_here
    return sparse.train(stream, notes, Budget(deadline, left))


def _warm_up(trainer: Trainer, stream: BatchStream, notes: Journal) -> None:
    """The indexers' dense warm-up, whole."""
    forget_peak()
    free_memory()
    plan = trainer.config.indexer
    until = time.monotonic() + plan.minutes * 60
    training = IndexerTraining(trainer.network, trainer.config)
    training.train(stream, notes, until=until, clock=time.monotonic, steps=plan.steps)


def _scored(trainer: Trainer, notes: Journal, *, sparse: bool) -> list[Score]:
    """Exact match of every suite; each is shown as it comes."""
    scores = []
    for score in Evaluation(trainer.network, trainer.config.evaluation, sparse=sparse).scores():
        scores.append(score)
        notes.note(
            f"{score.suite} at {score.length_tokens}: {score.exact_match:.3f} of {score.n}, "
            f"tokens {score.token_accuracy:.3f}"
        )
    return scores
