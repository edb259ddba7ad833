"""Median time of a call: events around graph replays or launches, or the host clock; inputs rotated."""

import time
from collections.abc import Sequence

import torch

from bench.case import Call, Timing

WARM_UP = 3
TARGET_US = 30_000.0
"""Time of one measured round; short calls are repeated until a round takes about as long."""
ROUNDS = 7


def time_us(calls: Sequence[Call], timing: Timing = Timing.GRAPH) -> float:
    """Median microseconds of one call; each round runs every call of `calls` as often as fits."""
    with torch.cuda.stream(torch.cuda.Stream()):
        for call in calls:
            for _ in range(WARM_UP):
                call()
        torch.cuda.synchronize()
        run = _captured(calls) if timing is Timing.GRAPH else _plain(calls)
        measure = _wall_us if timing is Timing.WALL else _round_us
        once = measure(run, 1)
        repeats = max(1, round(TARGET_US / max(once, 1.0)))
        rounds = sorted(measure(run, repeats) / repeats for _ in range(ROUNDS))
    return rounds[ROUNDS // 2] / len(calls)


def _plain(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


def _captured(calls: Sequence[Call]) -> Call:
    """All calls in one CUDA graph: what is timed is the device, not Python's launches."""
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for call in calls:
            call()
    return captured.replay


def _round_us(run: Call, repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def _wall_us(run: Call, repeats: int) -> float:
    """As a caller waits for it: each call's work is done before the next call."""
    stream = torch.cuda.current_stream()
    began = time.perf_counter()
    for _ in range(repeats):
        run()
        stream.synchronize()
    return (time.perf_counter() - began) * 1e6
