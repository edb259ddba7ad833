"""The same texts attended densely and by the indexers' choice: what choosing costs.

Texts of the training split that no step is trained on, always the same ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from forepage.training.backbone.batch_stream import Feeder
from forepage.training.backbone.batches import Batch
from forepage.training.backbone.config import IndexerConfig
from forepage.training.backbone.indexer_fit import Fitting, Sample
from forepage.training.backbone.step import TrainingStep


@dataclass(frozen=True)
class Comparison:
    """Means over batches; losses as trained, and of answers' tokens alone. Lists have a value a c4 layer."""

    dense_loss: float
    sparse_loss: float
    dense_answer_loss: float
    sparse_answer_loss: float
    kl: list[float]  # of the indexers, over the chosen entries
    kept: list[float]
    evidence: list[float]

    def text(self) -> str:
        """For people."""
        kl, kept = ([round(value, 4) for value in values] for values in (self.kl, self.kept))
        return (
            f"loss dense {self.dense_loss:.4f} sparse {self.sparse_loss:.4f}, of answers "
            f"{self.dense_answer_loss:.4f} and {self.sparse_answer_loss:.4f}; kl {kl} kept {kept}"
        )


def compare(
    step: TrainingStep, batches: Iterable[Batch], *, target: IndexerConfig, rows: int, seed: int
) -> Comparison:
    """Of a step's network, in its inputs and packing; nothing is trained."""
    feeder, draw = Feeder(step.inputs, buffers=1), np.random.default_rng(seed)
    losses, figures = [], []
    for batch in batches:
        feeder.feed(batch)
        sample = Sample.of(batch, step.packing, rows, draw)
        fitting = Fitting(sample, target, step.network.spec.index_topk)
        losses.append([*_losses(step, None), *_losses(step, fitting)])
        figures.append(fitting.figures())
    dense, dense_answers, sparse, sparse_answers = np.mean(losses, axis=0).tolist()
    fits = {name: np.mean([each[name] for each in figures], axis=0).tolist() for name in figures[0]}
    return Comparison(dense, sparse, dense_answers, sparse_answers, **fits)


def _losses(step: TrainingStep, fitting: Fitting | None) -> tuple[float, float]:
    """Of all tokens by weight, and of answers' tokens; sparse where there is something to fit."""
    # With gradients on, though none is taken: the compiled training code is used, no other is made.
    streams, _ = step.network(step.inputs, step.packing, sparse=fitting is not None, watch=fitting)
    losses, _ = step.network.head.losses(streams, step.inputs.targets)
    with torch.no_grad():
        weights, asked = step.inputs.weights, step.inputs.kinds > 0
        loss = (losses * weights).sum() / weights.sum()
        return loss.item(), ((losses * asked).sum() / asked.sum().clamp(min=1)).item()
