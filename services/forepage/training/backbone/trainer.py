"""The curriculum: stages in turn, each for its share of the time, from wherever the checkpoint stands."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from forepage.training.backbone import checkpoint
from forepage.training.backbone.batch_stream import BatchStream, Feeder
from forepage.training.backbone.batches import make_batch
from forepage.training.backbone.checkpoint import Progress
from forepage.training.backbone.config import StageConfig, TrainingConfig
from forepage.training.backbone.evaluation import free_memory
from forepage.training.backbone.initial import initialise
from forepage.training.backbone.journal import Journal
from forepage.training.backbone.network import Backbone
from forepage.training.backbone.official import official_weights, restore, start_from
from forepage.training.backbone.optimizer import INDEXER, Optimizer, rate_factor
from forepage.training.backbone.step import Reading, TrainingStep
from forepage.training.results import peak_gpu_bytes

READ_EVERY_S = 4.0
SAVE_EVERY_S = 120.0
Clock = Callable[[], float]


@dataclass(frozen=True)
class Budget:
    """When this call must stop training, by the clock or by steps; it may be resumed later."""

    deadline: float
    max_steps: int | None = None


class Trainer:
    """One run in one folder: network, optimiser, progress."""

    def __init__(
        self, config: TrainingConfig, folder: Path, device: torch.device, *, begin_at: Path | None = None
    ) -> None:
        """Take up the folder's checkpoint; without one begin anew, or at exported weights."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.config = config
        self.folder = folder
        self.network = Backbone(config.spec, dtype=dtype, device=device)
        initialise(self.network, config.seed)
        named = [item for item in self.network.named_parameters() if INDEXER not in item[0]]
        self.optimizer = Optimizer(named, config.optimizer)
        self.progress = Progress()
        self.resumed = False
        found = checkpoint.load(folder)
        if found is not None:
            self._restore(found)
        elif begin_at is not None:
            start_from(self.network, begin_at)
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(INDEXER not in name)
        if device.type == "cuda":
            self.network.compile_layers()
        self.steps_here = 0  # taken in this call

    def train(
        self, stream: BatchStream, journal: Journal, budget: Budget, clock: Clock = time.monotonic
    ) -> bool:
        """Train until all stages are done (True) or the budget is spent (False); either way it is saved."""
        step: TrainingStep | None = None
        while self.progress.stage < len(self.config.stages):
            stage = self.config.stages[self.progress.stage]
            if step is None or step.inputs.tokens.shape[0] != stage.tokens:
                step = None
                free_memory()
                step = TrainingStep(self.network, self.optimizer, stage.tokens)
                fresh = True
            else:
                fresh = False
            if not self._stage(step, fresh, stage, stream, journal, budget, clock):
                self.save()
                return False
            self.progress = replace(self.progress, stage=self.progress.stage + 1, step=0, stage_seconds=0.0)
            self.save()
        return True

    def save(self) -> None:
        """Write the checkpoint."""
        masters = official_weights(self.network)
        moments = self.config.moments
        checkpoint.save(self.folder, self.progress, masters, self.optimizer.state(), moments=moments)

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        restore(self.network, found.masters)
        self.optimizer.load_state(found.optimizer)
        self.progress = found.progress
        self.resumed = True

    def _stage(  # the loop: everything it needs is here to be read in one place
        self,
        step: TrainingStep,
        fresh: bool,
        stage: StageConfig,
        stream: BatchStream,
        journal: Journal,
        budget: Budget,
        clock: Clock,
    ) -> bool:
        """Run one stage; False when the budget ended it."""
        step.packing.pack([stage.length] * (stage.tokens // stage.length))
        step.inputs.fp8_share.fill_(float(stage.fp8_rows))
        feeder = Feeder(step.inputs)
        with stream.stage(stage, self.progress.stage, self.progress.step) as batches:
            if fresh:
                self._capture(step, feeder, stage, journal, clock)
            began = saved = read = clock()
            at_begin = self.progress
            while not self._finished(stage):
                now = clock()
                if now >= budget.deadline or self.steps_here == budget.max_steps:
                    self._read(step, stage, journal, now - read)
                    return False
                feeder.feed(next(batches))
                self.optimizer.set_rates(self._factor())
                step.run()
                self.steps_here += 1
                self._count(stage, at_begin, clock() - began)
                if now - read >= READ_EVERY_S:
                    self._read(step, stage, journal, now - read)
                    read = now
                if now - saved >= SAVE_EVERY_S:
                    self.save()
                    saved = now
            self._read(step, stage, journal, clock() - read)
        return True

    def _capture(
        self, step: TrainingStep, feeder: Feeder, stage: StageConfig, journal: Journal, clock: Clock
    ) -> None:
        """Compile and capture with a batch of the stage that training never uses."""
        began = clock()
        feeder.feed(make_batch(self.config.data, stage, len(self.config.stages), 0))
        self.optimizer.set_rates(0.0)
        step.capture()
        journal.note(f"{stage.name}: {stage.tokens} tokens a step, ready after {clock() - began:.0f} s")

    def _finished(self, stage: StageConfig) -> bool:
        if stage.steps is not None:
            return self.progress.step >= stage.steps
        return self.progress.stage_seconds >= self._stage_seconds(stage)

    def _stage_seconds(self, stage: StageConfig) -> float:
        shares = sum(other.share for other in self.config.stages)
        return self.config.minutes * 60 * stage.share / shares

    def _factor(self) -> float:
        """Of the rates: by steps where all stages have a number of them, else by time."""
        counts = [stage.steps for stage in self.config.stages]
        known = [count for count in counts if count is not None]
        if len(known) == len(counts):
            done = self.progress.total_steps / max(sum(known), 1)
        else:
            done = self.progress.seconds / (self.config.minutes * 60)
        anew = self.resumed and self.config.moments == "none"
        since = self.steps_here if anew else self.progress.total_steps
        return rate_factor(self.config.optimizer, step=since, progress=min(done, 1.0))

    def _count(self, stage: StageConfig, at_begin: Progress, elapsed: float) -> None:
        now = self.progress
        self.progress = replace(
            now,
            step=now.step + 1,
            total_steps=now.total_steps + 1,
            tokens=now.tokens + stage.tokens,
            stage_seconds=at_begin.stage_seconds + elapsed,
            seconds=at_begin.seconds + elapsed,
        )

    def _read(self, step: TrainingStep, stage: StageConfig, journal: Journal, seconds: float) -> None:
        note_reading(journal, self.progress, stage=stage, reading=step.read(), seconds=seconds)


def note_reading(
    journal: Journal,
    progress: Progress,
    *,
    stage: StageConfig,
    reading: Reading,
    seconds: float,
    more: Mapping[str, object] | None = None,
) -> None:
    """Write down what was counted in so many seconds, unless there was no step; `more` is added to it."""
    if not reading.steps:
        return
    rate = reading.steps * stage.tokens / max(seconds, 1e-9)
    row = {**asdict(progress), "name": stage.name, "tokens_per_s": rate, **asdict(reading)}
    kinds = " ".join(f"{name.removeprefix('ruler_')} {value:.2f}" for name, value in reading.accuracy.items())
    text = (
        f"{progress.seconds:6.0f}s {stage.name} step {progress.step} loss {reading.loss:.3f} "
        f"answers {reading.answer_loss:.3f} norm {reading.gradient_norm:.2f} "
        f"busiest {reading.imbalance:.2f} "
        f"{rate / 1e6:.2f} Mtok/s | {kinds}"
    )
    shown = "".join(f" {name} {value}" for name, value in (more or {}).items() if name != "phase")
    journal.write({**row, "peak_gpu_bytes": peak_gpu_bytes(), **(more or {})}, text + shown)
    journal.advance(progress.seconds, stage.name)
