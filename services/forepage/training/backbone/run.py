"""`forepage train backbone`: train or resume, export, score, report."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from forepage.training.backbone.batch_stream import BatchStream
from forepage.training.backbone.config import TrainingConfig
from forepage.training.backbone.evaluation import Evaluation, Score, free_memory
from forepage.training.backbone.indexer_training import IndexerTraining
from forepage.training.backbone.journal import Journal, journal
from forepage.training.backbone.official import export
from forepage.training.backbone.report import CURVE_FILE, can_draw, write_report
from forepage.training.backbone.trainer import Budget, Trainer

EXPORT_FOLDER = "export"


@dataclass(frozen=True)
class Order:
    """What one call is to do."""

    config: TrainingConfig
    folder: Path
    begin_at: Path | None = None  # exported weights to begin at, where there is no checkpoint
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
    with journal(order.folder, config.minutes * 60) as notes, BatchStream(config.data) as stream:
        trainer = Trainer(config, order.folder, device, begin_at=order.begin_at)
        count = sum(parameter.numel() for parameter in trainer.network.parameters())
        notes.note(f"{count:,} parameters; at {trainer.progress}")
        if not can_draw():
            notes.note(f"matplotlib is not installed: there will be no {CURVE_FILE}")
        done = trainer.train(stream, notes, Budget(deadline, order.steps))
        if done or order.indexer:
            _train_indexer(trainer, stream, notes, order.steps)
        export(trainer.network, config.model, order.folder / EXPORT_FOLDER)
        notes.note(f"exported after {time.monotonic() - began:.0f} s")
        free_memory()
        scores = _scored(trainer, notes) if order.evaluate else []
    raw = {"model": dict(config.model), "seed": config.seed, "minutes": config.minutes}
    write_report(order.folder, raw, scores)
    return done


def _train_indexer(trainer: Trainer, stream: BatchStream, notes: Journal, steps: int | None) -> None:
    """Dense warm-up, then the checkpoint again: its masters hold the indexers too."""
    training = IndexerTraining(trainer.network, trainer.config)
    until = time.monotonic() + trainer.config.indexer.minutes * 60
    training.train(stream, notes, until=until, clock=time.monotonic, steps=steps)
    trainer.save()


def _scored(trainer: Trainer, notes: Journal) -> list[Score]:
    """Exact match of every suite; each is shown as it comes."""
    scores = []
    for score in Evaluation(trainer.network, trainer.config.evaluation).scores():
        scores.append(score)
        notes.note(
            f"{score.suite} at {score.length_tokens}: {score.exact_match:.3f} of {score.n}, "
            f"tokens {score.token_accuracy:.3f}"
        )
    return scores
