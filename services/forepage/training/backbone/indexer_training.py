"""The Lightning Indexers' dense warm-up: the backbone frozen, each learns where its layer's attention goes.

Source: DeepSeek-V3.2's indexer training, first stage. What is learned is in `indexer_fit.py`.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from forepage.training.backbone.batch_stream import BatchStream, Feeder
from forepage.training.backbone.batches import Batch
from forepage.training.backbone.config import StageConfig, TrainingConfig
from forepage.training.backbone.indexer_fit import Fitting, Sample
from forepage.training.backbone.journal import Journal
from forepage.training.backbone.network import Backbone, Inputs
from forepage.training.backbone.optimizer import INDEXER, Optimizer
from forepage.training.backbone.packing import Packing
from forepage.training.results import peak_gpu_bytes

READ_EVERY_S = 5.0
BATCH_STREAM = 1000
"""Stage number of its batches: none that the curriculum has drawn."""


class IndexerTraining:
    """Trains the indexers of a network in place."""

    def __init__(self, network: Backbone, config: TrainingConfig) -> None:
        spec, device, plan = network.spec, network.embedding.device, config.indexer
        self.network = network
        self.config = config
        self.stage = StageConfig("indexer", plan.length, plan.tokens, 1.0, None, plan.records, 0.0, 1.0, True)
        self.inputs = Inputs.empty(plan.tokens, device)
        self.packing = Packing(
            plan.tokens, spec.compress_ratios, window_tokens=spec.window_tokens, device=device
        )
        self.packing.pack([plan.length] * (plan.tokens // plan.length))
        self.inputs.fp8_share.fill_(1.0)
        trained = [item for item in network.named_parameters() if INDEXER in item[0]]
        self.optimizer = Optimizer(trained, replace(config.optimizer, clip=plan.clip))
        self._draw = np.random.default_rng(config.seed)

    def train(
        self,
        stream: BatchStream,
        journal: Journal,
        *,
        until: float,
        clock: Callable[[], float],
        steps: int | None,
    ) -> int:
        """Train until the clock says so, or for so many steps; how many were taken."""
        trained = {name: value for name, value in self.network.named_parameters() if INDEXER in name}
        for value in trained.values():
            value.requires_grad_()
        feeder, began, taken, read = Feeder(self.inputs), clock(), 0, clock()
        with stream.stage(self.stage, BATCH_STREAM, 0) as batches:
            while taken != steps if steps is not None else clock() < until:
                done = (clock() - began) / (until - began) if steps is None else taken / steps
                warm = min(1.0, (taken + 1) / max(self.config.optimizer.warmup_steps, 1))
                fitting = self._step(next(batches), feeder, warm * (1 - done))
                taken += 1
                if clock() - read > READ_EVERY_S:
                    self._note(journal, clock() - began, taken, fitting)
                    read = clock()
        if taken:
            self._note(journal, clock() - began, taken, fitting)
        for value in trained.values():
            value.requires_grad_(False)
        return taken

    def fitted(self, sample: Sample) -> Fitting:
        """One dense forward pass of what the inputs hold, and how the indexers fit it."""
        fitting = Fitting(sample, self.config.indexer, self.network.spec.index_topk)
        self.network(self.inputs, self.packing, watch=fitting)
        return fitting

    def _step(self, batch: Batch, feeder: Feeder, factor: float) -> Fitting:
        feeder.feed(batch)
        self.optimizer.set_rates(factor)
        fitting = self.fitted(self.sample(batch))
        fitting.loss().backward()
        self.optimizer.step()
        for parameter in self.network.parameters():
            parameter.grad = None
        return fitting

    def sample(self, batch: Batch) -> Sample:
        """Tokens of the batch to learn from; others at every call."""
        return Sample.of(batch, self.packing, self.config.indexer.rows, self._draw)

    def _note(self, journal: Journal, seconds: float, steps: int, fitting: Fitting) -> None:
        figures = fitting.figures()
        row = {"phase": "indexer", "seconds": seconds, "steps": steps, **figures}
        text = " ".join(f"{name} {values}" for name, values in figures.items())
        journal.write(
            row | {"peak_gpu_bytes": peak_gpu_bytes()}, f"{seconds:6.0f}s indexer step {steps} {text}"
        )
