"""A benchmark case: one kernel at one shape, what it must move or compute, and a check."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

Call = Callable[[], object]


class Timing(StrEnum):
    """How a call is timed."""

    GRAPH = "replays of a graph"
    STREAM = "events on a stream"  # copies by the driver can't be captured
    WALL = "host clock, until done"


class Ceiling(StrEnum):
    """Which limit a case is held against; measured in the same run (`ceilings.py`)."""

    HOST_TO_DEVICE = "pinned host to device"
    MEMORY = "device memory, read + write"
    BF16 = "bf16 matrix product"
    FP8 = "fp8 matrix product"


@dataclass(frozen=True)
class Case:
    """`calls` do the same work on different data, so that no call finds the last one's inputs cached.

    `num_bytes` and `flops` are the least a perfect version moves and computes. `check` gives the worst
    error against the reference and raises where the error is not one of rounding. `torch_call` is plain
    torch's way; `other_call` another implementation, named in `other`.
    """

    kernel: str
    shape: str
    dtype: str
    num_bytes: int
    flops: int
    ceilings: Sequence[Ceiling]
    calls: Sequence[Call]
    check: Callable[[], float]
    torch_call: Call | None = None
    other_call: Call | None = None
    other: str | None = None
    timing: Timing = Timing.GRAPH


class WrongResultError(Exception):
    """A kernel's output differs from its reference: its speed is of no interest."""


def worst_error(name: str, got: Tensor, wanted: Tensor, *, tolerance: float) -> float:
    """Largest |got - wanted| relative to the largest |wanted|. Raises: WrongResultError above tolerance."""
    scale = float(wanted.float().abs().max().clamp(min=1e-30))
    error = float((got.float() - wanted.float()).abs().max()) / scale
    if not error <= tolerance:  # NaN fails too
        raise WrongResultError(f"{name}: error {error:.3g} of the largest value, {tolerance:.3g} allowed")
    return error
