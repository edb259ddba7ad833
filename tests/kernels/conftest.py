"""Kernel tests: without a GPU Triton interprets the kernels, with one the same tests run on it.

The variable must be set before any kernel module is imported: tests/conftest.py does it. Tests that use
`device` count as `gpu` tests on a CUDA machine, so `-m gpu` there runs every kernel, at small and real
sizes; tests of the references alone never need one.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HAS_CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class Tolerance:
    """How far a kernel may be from its reference, and why."""

    rtol: float
    atol: float
    reason: str


TOLERANCES = {
    torch.float32: Tolerance(2e-5, 2e-5, "up to 8,320 fp32 products summed in another order; tf32x3"),
    torch.bfloat16: Tolerance(2e-2, 1e-2, "probabilities, queries and the output are rounded to 8 bits"),
}


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker here too: a GPU machine may run this folder without the project's settings."""
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests without a GPU; with one, every test of a kernel is a `gpu` test."""
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        if not HAS_CUDA and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif HAS_CUDA and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU under Triton's interpreter."""
    return torch.device("cuda", 0) if HAS_CUDA else torch.device("cpu")


@pytest.fixture
def generator() -> torch.Generator:
    """Seeded randomness on the CPU, so that every device sees the same inputs."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def assert_close() -> Callable[[Tensor, Tensor], None]:
    """Compare a kernel's output (got, want) within the table's tolerance for its dtype; NaN never passes."""

    def check(got: Tensor, want: Tensor) -> None:
        tolerance = TOLERANCES[got.dtype]
        torch.testing.assert_close(got.cpu(), want.cpu(), rtol=tolerance.rtol, atol=tolerance.atol)

    return check


@pytest.fixture
def nan_outputs() -> Callable[[], AbstractContextManager[None]]:
    """While open, torch fills new tensors with NaN (integers: the largest): an unwritten output shows."""

    @contextmanager
    def fill() -> Iterator[None]:
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)

    return fill


@pytest.fixture
def register_arena(device: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
    """Let the GPU read a host tensor in place, as workers do with the shared arena."""
    registered: list[int] = []
    cudart: Any = torch.cuda.cudart

    def register(arena: Tensor) -> Tensor:
        if device.type == "cuda":
            status = cudart().cudaHostRegister(arena.data_ptr(), arena.nbytes, 0)
            assert int(status) == 0, f"cudaHostRegister: {status}"
            registered.append(arena.data_ptr())
        return arena

    yield register
    if registered:
        torch.cuda.synchronize()
    for pointer in registered:
        cudart().cudaHostUnregister(pointer)
