"""Batches in order, made ahead by worker processes and put on the device through pinned memory."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from forepage.training.backbone.batches import Batch, make_batch
from forepage.training.backbone.config import DataConfig, StageConfig
from forepage.training.backbone.network import Inputs

AHEAD_PER_WORKER = 3


class BatchStream:
    """Open once for a run; `stage` begins anew at any step. Without workers, its user makes the batches."""

    def __init__(self, data: DataConfig) -> None:
        self._data = data
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self._data.workers:
            # Spawned, not forked: the parent holds a GPU and threads.
            self._pool = ProcessPoolExecutor(self._data.workers, mp_context=get_context("spawn"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    @contextmanager
    def stage(self, stage: StageConfig, stage_idx: int, step: int) -> Iterator[Iterator[Batch]]:
        """The stage's batches from a step on; those made in vain are dropped at the end."""
        if self._pool is None:
            yield (make_batch(self._data, stage, stage_idx, number) for number in _count(step))
            return
        waiting: deque[Future[Batch]] = deque()
        numbers = _count(step)
        pool = self._pool

        def batches() -> Iterator[Batch]:
            while True:
                while len(waiting) < AHEAD_PER_WORKER * self._data.workers:
                    waiting.append(pool.submit(make_batch, self._data, stage, stage_idx, next(numbers)))
                yield waiting.popleft().result()

        try:
            yield batches()
        finally:
            for future in waiting:
                future.cancel()


class Feeder:
    """Copies batches into a step's inputs: pinned buffers in turn, so copies overlap with the GPU's work."""

    def __init__(self, inputs: Inputs, buffers: int = 4) -> None:
        self._inputs = inputs
        self._cuda = inputs.tokens.is_cuda
        self._buffers = [_staging(inputs.tokens.shape[0], self._cuda) for _ in range(buffers)]
        # Types change on the device: a copy that changes them is made of pageable memory, and waits.
        self._arrived = {name: buffer.to(inputs.tokens.device) for name, buffer in self._buffers[0].items()}
        self._events: list[torch.cuda.Event | None] = [None] * buffers
        self._next = 0

    def feed(self, batch: Batch) -> None:
        """Fill the inputs; a GPU does so in the order of its stream."""
        place, self._next = self._next, (self._next + 1) % len(self._buffers)
        event = self._events[place]
        if event is not None:
            event.synchronize()
        for name, buffer in self._buffers[place].items():
            source = getattr(batch, name)
            np.copyto(buffer.numpy(), source, casting="unsafe")
            arrived = self._arrived[name]
            arrived.copy_(buffer, non_blocking=True)
            getattr(self._inputs, name).copy_(arrived)
        if self._cuda:
            event = torch.cuda.Event()
            event.record()
            self._events[place] = event


def _staging(num_tokens: int, pinned: bool) -> dict[str, Tensor]:
    """Host buffers in the smallest type that holds each input."""
    kinds = {
        "tokens": torch.int16,
        "targets": torch.int16,
        "kinds": torch.uint8,
        "decisive": torch.bool,
        "positions": torch.int32,
        "weights": torch.float32,
        "flattening": torch.float32,
    }
    return {name: torch.empty(num_tokens, dtype=dtype, pin_memory=pinned) for name, dtype in kinds.items()}


def _count(start: int) -> Iterator[int]:
    while True:
        yield start
        start += 1
