"""The training's sinkhorn kernels equal its plain torch, both ways."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from forepage.training.backbone import sinkhorn_kernel
from forepage.training.backbone.sinkhorn import _reference, _reference_backward

EPS = 1e-6
Check = Callable[[Tensor, Tensor], None]


def inputs(count: int, device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits of every spread, and a gradient of the result."""
    spread = torch.logspace(-1, 0.7, count)[:, None, None]
    logits, gradient = (torch.randn(count, 4, 4, generator=generator) for _ in range(2))
    return (logits * spread).to(device), gradient.to(device)


@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("count", [1, 127, 129])
def test_kernels_equal_their_reference(
    count: int,
    iterations: int,
    device: torch.device,
    generator: torch.Generator,
    assert_close: Check,
) -> None:
    logits, gradient = inputs(count, device, generator)
    assert_close(sinkhorn_kernel.forward(logits, iterations, EPS), _reference(logits.cpu(), iterations, EPS))
    # Two independent orders of the same fp32 sums; `test_training_sinkhorn` holds the reference to fp64.
    assert_close(
        sinkhorn_kernel.backward(logits, gradient, iterations, EPS),
        _reference_backward(logits.cpu(), gradient.cpu(), iterations, EPS),
    )


def test_kernels_take_views(device: torch.device, generator: torch.Generator, assert_close: Check) -> None:
    logits, gradient = inputs(65, device, generator)
    turned, gradient = logits.transpose(1, 2), gradient.transpose(1, 2)
    assert_close(sinkhorn_kernel.forward(turned, 3, EPS), _reference(turned.cpu(), 3, EPS))
    assert_close(
        sinkhorn_kernel.backward(turned, gradient, 3, EPS),
        _reference_backward(turned.cpu(), gradient.cpu(), 3, EPS),
    )
