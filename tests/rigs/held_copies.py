"""Copies between device and arena that wait until a test lets them go."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rigs.worker import WorkerRig


@contextmanager
def copies_held(rig: WorkerRig) -> Iterator[None]:
    """Within the block no copy that is asked for begins."""
    gate = threading.Event()
    for rank in rig.ranks:
        rank.copies._executor.submit(gate.wait)
    try:
        yield
    finally:
        gate.set()


def turn(rig: WorkerRig, times: int) -> None:
    """So many turns of the loop, whatever becomes of anything; the laws of the blocks hold after each."""
    with torch.inference_mode():
        for _ in range(times):
            rig.loop.turn()
            rig.parts.blocks.check_integrity()
