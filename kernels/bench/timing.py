"""Median time of a call on the device: events around graph replays, inputs rotated."""

from collections.abc import Sequence

import torch

from bench.case import Call

WARM_UP = 3
TARGET_US = 30_000.0
"""Time of one measured round; short calls are repeated until a round takes about as long."""
ROUNDS = 7


def time_us(calls: Sequence[Call], *, graph: bool = True) -> float:
    """Median microseconds of one call; each round runs every call of `calls` as often as fits."""
    for call in calls:
        for _ in range(WARM_UP):
            call()
    torch.cuda.synchronize()
    run = _captured(calls) if graph else _plain(calls)
    once = _round_us(run, 1)
    repeats = max(1, round(TARGET_US / max(once, 1.0)))
    rounds = sorted(_round_us(run, repeats) / repeats for _ in range(ROUNDS))
    return rounds[ROUNDS // 2] / len(calls)


def _plain(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


def _captured(calls: Sequence[Call]) -> Call:
    """All calls in one CUDA graph: what is timed is the device, not Python's launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
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
