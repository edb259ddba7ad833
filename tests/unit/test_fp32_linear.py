"""Products of bf16 matrices with fp32 sums: exact parts, and how near to the oracle a GPU is."""

import pytest
import torch
from torch import Tensor

from forepage.model.fp32_linear import NUM_PARTS, bf16_parts, fp32_linear, split_linear
from forepage.model.held_form import HeldForm
from forepage.model.stored_form import Span
from forepage.model.weight_table import Role, WeightEntry
from forepage.settings import WeightDtype

SHAPE = (24, 16_384)


def _drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_parts_of_a_matrix_sum_to_its_very_bits() -> None:
    weight = _drawn(*SHAPE, seed=1) * torch.logspace(-20, 20, SHAPE[1])
    parts = bf16_parts(weight)
    assert parts.dtype is torch.bfloat16
    assert parts.shape == (NUM_PARTS * SHAPE[0], SHAPE[1])
    assert torch.equal(parts.double().view(NUM_PARTS, *SHAPE).sum(0).float(), weight)


def test_an_fp32_matrix_takes_inputs_of_any_dtype() -> None:
    x, weight = _drawn(3, 64, seed=2, dtype=torch.bfloat16), _drawn(5, 64, seed=3)
    assert torch.equal(fp32_linear(x, weight), x.float() @ weight.mT)


@pytest.mark.parametrize(
    ("dtype", "device", "stored", "held"),
    [
        (WeightDtype.STORED, "cuda", "BF16", "BF16"),
        (WeightDtype.BF16, "cuda", "BF16", "BF16"),
        (WeightDtype.BF16, "cuda", "F32", "F32"),
        (WeightDtype.BF16, "cuda", None, "F32"),
        (WeightDtype.FP32, "cuda", "BF16", "F32"),
        (WeightDtype.BF16, "cpu", "BF16", "F32"),
        (WeightDtype.STORED, "cpu", "BF16", "F32"),
    ],
)
def test_it_is_held_in_bf16_where_that_loses_nothing(
    dtype: WeightDtype, device: str, stored: str | None, held: str
) -> None:
    entry = WeightEntry((4, 8), Role.FP32_MATRIX)
    [(_, tensor)] = HeldForm.of(dtype, device).parts("head.weight", entry, stored, Span.of(entry.shape))
    assert tensor.dtype == held


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 7, 85])
@pytest.mark.parametrize(("outputs", "inputs"), [(1_000, 4_096), (32, 4_096), SHAPE])
def test_a_gpu_is_within_a_millionth_of_the_magnitudes_it_sums(rows: int, outputs: int, inputs: int) -> None:
    """Its sums keep fewer bits than an fp32 product's; the inputs are rounded to 2^-9 before."""
    x = _drawn(rows, inputs, seed=4, dtype=torch.bfloat16).cuda()
    stored = _drawn(outputs, inputs, seed=5, dtype=torch.bfloat16).cuda()
    full = _drawn(outputs, inputs, seed=6).cuda()
    cases = (
        (fp32_linear(x, stored), stored),
        (split_linear(x, bf16_parts(full)), full),
    )
    for found, weight in cases:
        oracle = x.double() @ weight.double().mT
        magnitudes = x.double().abs() @ weight.double().abs().mT
        assert found.dtype is torch.float32
        assert ((found.double() - oracle).abs() <= 2.0**-20 * magnitudes).all()
