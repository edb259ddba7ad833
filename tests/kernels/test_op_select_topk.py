"""select_topk: the exact set, ties to the lower index, ascending, padded with -1."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from forepage_kernels.select_topk import kernel, reference, select_topk

NanOutputs = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Case:
    """`fill` makes the logits f32 [rows, entries]."""

    id: str
    rows: int
    entries: int
    k: int
    fill: Callable[[int, int, torch.Generator], Tensor]
    gpu: bool = False


def distinct(rows: int, entries: int, generator: torch.Generator) -> Tensor:
    """Random values of both signs."""
    return torch.randn(rows, entries, generator=generator)


def tied(rows: int, entries: int, generator: torch.Generator) -> Tensor:
    """Nine distinct values, zeros of both signs among them."""
    x = torch.randint(-4, 5, (rows, entries), generator=generator).float()
    return torch.where(torch.rand(rows, entries, generator=generator) < 0.5, x, -x)


def equal(rows: int, entries: int, generator: torch.Generator) -> Tensor:
    """One random value everywhere."""
    return torch.randn(1, 1, generator=generator).repeat(rows, entries)


def mostly_absent(rows: int, entries: int, generator: torch.Generator) -> Tensor:
    """-inf but for one in twenty; every other row has nothing at all."""
    x = torch.randn(rows, entries, generator=generator)
    x[torch.rand(rows, entries, generator=generator) < 0.95] = -math.inf
    x[::2] = -math.inf
    return x


def extreme(rows: int, entries: int, generator: torch.Generator) -> Tensor:
    """Largest, smallest, subnormal, infinite and not-a-number values."""
    menu = torch.tensor([3.4e38, -3.4e38, 1e-45, -1e-45, math.inf, -math.inf, math.nan, 1e-38, 0.0, -0.0])
    return menu[torch.randint(0, len(menu), (rows, entries), generator=generator)]


def signed_zeros(rows: int, entries: int, generator: torch.Generator) -> Tensor:
    """Zeros of both signs and a few larger values: every cut goes through equal zeros."""
    x = torch.where(torch.rand(rows, entries, generator=generator) < 0.5, 0.0, -0.0)
    return torch.where(torch.rand(rows, entries, generator=generator) < 0.05, 1.0, x)


def close(rows: int, entries: int, generator: torch.Generator) -> Tensor:
    """Values that differ in their last bits only."""
    bits = 0x3F800000 + torch.randint(0, entries, (rows, entries), generator=generator, dtype=torch.int32)
    return bits.view(torch.float32)


CASES = [
    Case("one-entry", 1, 1, 1, distinct),
    Case("k-exceeds-n", 2, 63, 64, distinct),
    Case("k-equals-n", 2, 129, 129, tied),
    Case("ties-129", 3, 129, 17, tied),
    Case("all-equal", 2, 129, 5, equal),
    Case("signed-zeros", 3, 129, 40, signed_zeros),
    Case("mostly-absent", 4, 129, 63, mostly_absent),
    Case("no-entries", 2, 0, 3, distinct),
    Case("no-rows", 0, 5, 3, distinct),
    Case("extremes", 4, 129, 40, extreme),
    Case("last-bits-across-tiles", 1, 9001, 512, close),
    Case("ties-across-tiles", 2, 8192, 1024, tied),
    Case("three-levels", 1, 9001, 3, tied),
    Case("three-levels-absent", 2, 9001, 17, mostly_absent),
    Case("four-levels-last-bits", 1, 600_001, 1, close),
    Case("k-wider-than-a-tile", 1, 4097, 5000, mostly_absent),
    Case("flash-1m", 4, 262_144, 512, distinct, gpu=True),
    Case("flash-1m-ties", 3, 262_143, 1024, tied, gpu=True),
    Case("flash-1m-absent", 4, 262_144, 1024, mostly_absent, gpu=True),
    Case("flash-1m-last-bits", 2, 262_144, 512, close, gpu=True),
    Case("flash-64k-batch", 64, 16_384, 512, distinct, gpu=True),
    Case("beyond-1m", 1, 400_001, 1024, extreme, gpu=True),
]


def ranked(row: list[float], k: int) -> list[int]:
    """The definition: sort by (-value, index), cut, sort by index, pad."""
    order = sorted((-value, index) for index, value in enumerate(row) if value > -math.inf)
    taken = sorted(index for _, index in order[:k])
    return taken + [-1] * (k - len(taken))


@pytest.mark.parametrize("case", [case for case in CASES if not case.gpu], ids=lambda case: case.id)
def test_reference_equals_a_sorted_list(case: Case, generator: torch.Generator) -> None:
    logits = case.fill(case.rows, case.entries, generator)
    want = [ranked(row, case.k) for row in logits.tolist()]
    assert select_topk(logits, case.k).tolist() == want


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from([-math.inf, -2.0, -0.0, 0.0, 1.0, math.inf, math.nan])
        | st.floats(width=32, allow_nan=False),
        max_size=40,
    ),
    st.integers(1, 45),
)
def test_reference_equals_a_sorted_list_on_any_row(row: list[float], k: int) -> None:
    assert select_topk(torch.tensor([row], dtype=torch.float32), k).tolist() == [ranked(row, k)]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.id, marks=[pytest.mark.gpu] * case.gpu) for case in CASES]
)
def test_kernel_selects_the_same_entries(
    case: Case, device: torch.device, generator: torch.Generator, nan_outputs: NanOutputs
) -> None:
    logits = case.fill(case.rows, case.entries, generator)
    with nan_outputs():
        run = select_topk if device.type == "cuda" else kernel.select_topk
        got = run(logits.to(device), case.k).cpu()
    assert torch.equal(got, reference.select_topk(logits, case.k))
