"""`triton.jit` with a type, so that strict type checking reaches the launchers.

Only kernel modules import this (it needs Triton). Kernel bodies are Triton's language, not Python:
their tensors are typed `tl.tensor`, which is Any to a checker.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import torch
import triton
from torch import Tensor


class Kernel(Protocol):
    """A compiled (with TRITON_INTERPRET=1 interpreted) function: launched on a grid, or called inside one."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def jit(fn: Callable[..., Any]) -> Kernel:
    """Make a Triton function; it is compiled at its first launch."""
    return cast(Kernel, triton.jit(fn))


def jit_unspecialised(*names: str) -> Callable[[Callable[..., Any]], Kernel]:
    """`jit`, but one binary for all values of these integers.

    Triton compiles 1 and multiples of 16 apart. Where results must not depend on a pool's size by a
    single bit, only one binary can promise that.
    """

    def decorate(fn: Callable[..., Any]) -> Kernel:
        return cast(Kernel, triton.jit(fn, do_not_specialize=list(names)))

    return decorate


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: its bf16 is wrong, so they stay in fp32 there."""
    return bool(triton.knobs.runtime.interpret)


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n >= 1: the size of a Triton range over n things."""
    return 1 << (n - 1).bit_length()


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch on this tensor's GPU; nothing to do for a CPU tensor (the interpreter)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
