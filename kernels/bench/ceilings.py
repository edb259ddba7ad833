"""The device's own limits, measured in the same run as the kernels that are held against them."""

import torch

from bench.case import Ceiling, Timing
from bench.timing import time_us

GIB = 1 << 30


def measure_ceilings(device: torch.device) -> dict[Ceiling, float]:
    """Bytes or floating-point operations a second, by ceiling."""
    return {
        Ceiling.HOST_TO_DEVICE: _host_to_device(device),
        Ceiling.MEMORY: _memory(device),
        Ceiling.BF16: _bf16(device),
        Ceiling.FP8: _fp8(device),
    }


def _host_to_device(device: torch.device) -> float:
    host = torch.empty(GIB, dtype=torch.uint8, pin_memory=True).random_()
    target = torch.empty(GIB, dtype=torch.uint8, device=device)
    return GIB / time_us([lambda: target.copy_(host, non_blocking=True)], Timing.STREAM) * 1e6


def _memory(device: torch.device) -> float:
    source = torch.empty(GIB, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * GIB / time_us([lambda: target.copy_(source)], Timing.STREAM) * 1e6


def _bf16(device: torch.device) -> float:
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / time_us([lambda: a @ b], Timing.STREAM) * 1e6


def _fp8(device: torch.device) -> float:
    size = 8192
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    product = lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)  # noqa: E731
    return 2 * size**3 / time_us([product], Timing.STREAM) * 1e6
