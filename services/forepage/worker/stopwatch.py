"""Times what is launched on a device without waiting for it: by events there, by a clock on the CPU."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Told = Callable[[float], None]
"""Who is told how many milliseconds something took."""


class Stopwatch:
    """Measurements under way, oldest first; used by the thread that launches."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._is_gpu = device.type == "cuda"
        self._clock = clock
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event, Told]] = deque()

    @contextmanager
    def time(self, tell: Told) -> Iterator[None]:
        """Around what is launched on the current stream; told behind it on the CPU, else at a later call."""
        if not self._is_gpu:
            begin_s = self._clock()
            yield
            tell((self._clock() - begin_s) * 1e3)
            return
        self.settle()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._running.append((begin, end, tell))

    def settle(self) -> None:
        """Tell of all that has ended on the device; never waits."""
        while self._running and self._running[0][1].query():
            begin, end, tell = self._running.popleft()
            tell(begin.elapsed_time(end))
