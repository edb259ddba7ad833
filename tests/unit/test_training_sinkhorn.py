"""The balancing of stream matrices: the served model's values, and a gradient that is one."""

import pytest
import torch
from torch import Tensor

from forepage.training.backbone.sinkhorn import sinkhorn

EPS = 1e-6
ITERATIONS = 20


def plain(logits: Tensor, iterations: int) -> Tensor:
    """The equations of the release, which autograd differentiates by itself."""
    comb = torch.softmax(logits, dim=-1) + EPS
    comb = comb / (comb.sum(-2, keepdim=True) + EPS)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + EPS)
        comb = comb / (comb.sum(-2, keepdim=True) + EPS)
    return comb


def logits(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Some even, some nearly one-hot: what trained mixing matrices are like."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(-1, 1, count, dtype=dtype)[:, None, None]
    return torch.randn(count, 4, 4, generator=generator, dtype=dtype) * spread


@pytest.mark.parametrize("iterations", [1, 2, ITERATIONS])
def test_values_are_the_equations(iterations: int) -> None:
    x = logits(9)
    torch.testing.assert_close(sinkhorn(x, iterations, EPS), plain(x, iterations), rtol=1e-13, atol=1e-13)


def test_columns_sum_to_one_and_rows_nearly() -> None:
    balanced = sinkhorn(logits(9), ITERATIONS, EPS)
    torch.testing.assert_close(balanced.sum(-2), torch.ones(9, 4, dtype=torch.float64), rtol=0, atol=1e-5)
    assert (balanced.sum(-1) - 1).abs().median() < 1e-3


@pytest.mark.parametrize("iterations", [1, 2, ITERATIONS])
def test_gradient_is_right_by_finite_differences(iterations: int) -> None:
    x = logits(5).requires_grad_()
    assert torch.autograd.gradcheck(lambda one: sinkhorn(one, iterations, EPS), (x,))


def test_gradient_is_autograds_in_fp32() -> None:
    """Undoing normalisations one by one loses nothing that matters: 2e-5 of the largest entry."""
    x = logits(33, torch.float32)
    upstream = torch.randn(33, 4, 4, generator=torch.Generator().manual_seed(1))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    sinkhorn(ours, ITERATIONS, EPS).backward(upstream)
    plain(theirs, ITERATIONS).backward(upstream)
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=2e-5 * float(theirs.grad.abs().max()))
    assert theirs.grad.abs().max() > 0.1


def test_gradient_of_a_view_that_is_not_contiguous() -> None:
    x = logits(6).transpose(1, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda one: sinkhorn(one, 3, EPS).transpose(1, 2), (x,))
