"""The last stage: c4 layers attend what their indexers choose, as served; backbone and indexers adapt to it.

Each has an optimiser of its own. The backbone learns from the language model's loss under that selection;
the indexers from the KL of their softmax from attention over the chosen entries, which nothing else feels.
Source: DeepSeek-V3.2's sparse training stage. Owns RUN/sparse; a run that has it is past everything before.
"""

import time
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np

from forepage.training.backbone import checkpoint
from forepage.training.backbone.batch_stream import BatchStream, Feeder
from forepage.training.backbone.batches import Batch
from forepage.training.backbone.checkpoint import Progress
from forepage.training.backbone.comparison import compare
from forepage.training.backbone.config import OptimizerConfig, TrainingConfig
from forepage.training.backbone.evaluation import free_memory
from forepage.training.backbone.indexer_fit import Fitting, Sample
from forepage.training.backbone.journal import Journal
from forepage.training.backbone.memory import memory_text
from forepage.training.backbone.network import Backbone
from forepage.training.backbone.official import official_weights, restore
from forepage.training.backbone.optimizer import INDEXER, Optimizer, rate_factor
from forepage.training.backbone.step import TrainingStep
from forepage.training.backbone.trainer import READ_EVERY_S, SAVE_EVERY_S, Budget, Clock, note_reading

FOLDER = "sparse"
NAME = "sparse"
BATCH_STREAM = 2000
COMPARISON_STREAM = 2001
"""Stage numbers of batches: none that the curriculum or the warm-up has drawn."""
COMPARED_BATCHES = 2


class SparseTraining:
    """Trains a network in place; `begun` once there is a checkpoint of it."""

    def __init__(self, network: Backbone, config: TrainingConfig, folder: Path) -> None:
        """Take up the checkpoint in `folder`/sparse, if there is one: the network then has its weights."""
        plan, named = config.sparse, list(network.named_parameters())
        self.network = network
        self.config = config
        self.folder = folder / FOLDER
        self.stage = replace(
            config.stages[-1],
            name=NAME,
            length=plan.length,
            tokens=plan.tokens,
            records=plan.records,
            fp8_rows=True,
        )
        self.optimizers = {
            "backbone": Optimizer(
                [item for item in named if INDEXER not in item[0]],
                _at_rate(config.optimizer, plan.backbone_rate),
            ),
            "indexers": Optimizer(
                [item for item in named if INDEXER in item[0]],
                replace(_at_rate(config.optimizer, plan.indexer_rate), clip=config.indexer.clip),
            ),
        }
        self.progress = Progress()
        self._steps_here = 0
        found = checkpoint.load(self.folder)
        self.begun = self._resumed = found is not None
        if found is not None:
            self._restore(found)

    def begin(self, progress: Progress) -> None:
        """Write the first checkpoint, of the network as it is; `progress` is that of the run so far."""
        self.progress = replace(progress, stage=len(self.config.stages), step=0, stage_seconds=0.0)
        self.save()
        self.begun = True

    def train(
        self, stream: BatchStream, journal: Journal, budget: Budget, clock: Clock = time.monotonic
    ) -> bool:
        """Train until the stage is done (True) or the budget is spent (False); either way it is saved."""
        if self._finished():
            return True
        if self._spent(budget, clock()):
            return False
        journal.note(f"{NAME}: {memory_text(self.config)}")
        for parameter in self.network.parameters():
            parameter.requires_grad_()
        free_memory()
        step = TrainingStep(
            self.network,
            self.optimizers["backbone"],
            self.stage.tokens,
            indexers=self.optimizers["indexers"],
        )
        step.packing.pack([self.stage.length] * (self.stage.tokens // self.stage.length))
        step.inputs.fp8_share.fill_(1.0)
        if not self.progress.step:
            self._compare(step, stream, journal, "before")
        done = self._steps(step, stream, journal, budget, clock)
        if done:
            self._compare(step, stream, journal, "after")
        self.save()
        return done

    def save(self) -> None:
        """Write the checkpoint."""
        state = {
            f"{part}.{name}": value
            for part, optimizer in self.optimizers.items()
            for name, value in optimizer.state().items()
        }
        moments = self.config.moments
        checkpoint.save(self.folder, self.progress, official_weights(self.network), state, moments=moments)

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        restore(self.network, found.masters)
        for part, optimizer in self.optimizers.items():
            prefix = f"{part}."
            state = found.optimizer.items()
            optimizer.load_state(
                {name.removeprefix(prefix): value for name, value in state if name.startswith(prefix)}
            )
        self.progress = found.progress

    def _steps(
        self, step: TrainingStep, stream: BatchStream, journal: Journal, budget: Budget, clock: Clock
    ) -> bool:
        """Take steps; False when the budget ended it."""
        feeder = Feeder(step.inputs)
        with stream.stage(self.stage, BATCH_STREAM, self.progress.step) as batches:
            if step.inputs.tokens.is_cuda:
                self._rehearse(step, feeder, stream)
            began = saved = read = clock()
            at_begin = self.progress
            fitting: Fitting | None = None
            while not self._finished() and not self._spent(budget, now := clock()):
                batch = next(batches)
                feeder.feed(batch)
                fitting = self._fitting(step, batch)
                self._step(step, fitting)
                self._count(at_begin, clock() - began)
                if now - read >= READ_EVERY_S:
                    self._read(step, fitting, journal, now - read)
                    read = now
                if now - saved >= SAVE_EVERY_S:
                    self.save()
                    saved = now
            self._read(step, fitting, journal, clock() - read)
        return self._finished()

    def _step(self, step: TrainingStep, fitting: Fitting) -> None:
        factor = self._factor()
        for optimizer in self.optimizers.values():
            optimizer.set_rates(factor)
        step.run(fitting)
        self._steps_here += 1

    def _rehearse(self, step: TrainingStep, feeder: Feeder, stream: BatchStream) -> None:
        """Compile before the clock starts."""
        with stream.stage(self.stage, COMPARISON_STREAM, 0) as batches:
            batch = next(batches)
        feeder.feed(batch)
        step.rehearse(self._fitting(step, batch))

    def _fitting(self, step: TrainingStep, batch: Batch) -> Fitting:
        """To tokens of the batch drawn by the number of the step: a resumed run draws the same."""
        draw = np.random.default_rng((self.config.seed, BATCH_STREAM, self.progress.step))
        sample = Sample.of(batch, step.packing, self.config.sparse.rows, draw)
        return Fitting(sample, self.config.indexer, self.network.spec.index_topk)

    def _compare(self, step: TrainingStep, stream: BatchStream, journal: Journal, when: str) -> None:
        with stream.stage(self.stage, COMPARISON_STREAM, 0) as batches:
            found = compare(
                step,
                islice(batches, COMPARED_BATCHES),
                target=self.config.indexer,
                rows=self.config.sparse.rows,
                seed=self.config.seed,
            )
        journal.write({"phase": "comparison", "when": when, **asdict(found)}, f"{when}: {found.text()}")

    def _finished(self) -> bool:
        plan = self.config.sparse
        if plan.steps is not None:
            return self.progress.step >= plan.steps
        return self.progress.stage_seconds >= plan.minutes * 60

    def _spent(self, budget: Budget, now: float) -> bool:
        return now >= budget.deadline or self._steps_here == budget.max_steps

    def _factor(self) -> float:
        """Of the rates: by steps where there is a number of them, else by time."""
        plan, now = self.config.sparse, self.progress
        done = now.step / plan.steps if plan.steps else now.stage_seconds / (plan.minutes * 60)
        anew = self._resumed and self.config.moments == "none"
        since = self._steps_here if anew else now.step
        return rate_factor(self.config.optimizer, step=since, progress=min(done, 1.0))

    def _count(self, at_begin: Progress, elapsed: float) -> None:
        now = self.progress
        self.progress = replace(
            now,
            step=now.step + 1,
            total_steps=now.total_steps + 1,
            tokens=now.tokens + self.stage.tokens,
            stage_seconds=at_begin.stage_seconds + elapsed,
            seconds=at_begin.seconds + elapsed,
        )

    def _read(self, step: TrainingStep, fitting: Fitting | None, journal: Journal, seconds: float) -> None:
        figures = {} if fitting is None else fitting.figures()
        note_reading(
            journal,
            self.progress,
            stage=self.stage,
            reading=step.read(),
            seconds=seconds,
            more={"phase": "sparse", **figures},
        )


def _at_rate(config: OptimizerConfig, factor: float) -> OptimizerConfig:
    """All rates times a factor, the routing balance's too."""
    return replace(
        config,
        muon_lr=config.muon_lr * factor,
        adam_lr=config.adam_lr * factor,
        balance_rate=config.balance_rate * factor,
    )
