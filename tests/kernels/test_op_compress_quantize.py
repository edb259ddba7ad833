"""compress_quantize: pooled, normalised, rotated and stored exactly where and as the layout says."""

import cmath
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from forepage_kernels.compress_quantize import compress_quantize, kernel, reference
from forepage_kernels.layout import Format, KeyFormat, KeyLayout, KeyPool, RowLayout, RowPool, load_rows

EPS = 1e-6
CODE_FLIPS = 1e-3
"""Share of codes that may be one step off: fp32 sums in another order land on the other side of a tie."""


@dataclass(frozen=True)
class Case:
    """`rows` windows of `tokens` tokens; `absent` makes each first half a missing previous window."""

    id: str
    layout: RowLayout | KeyLayout
    rows: int
    tokens: int
    rope_dims: int
    absent: bool = False
    gpu: bool = False


FLASH = RowLayout(64, 448, 64, "fp8")
KEY = KeyLayout(64, 128, "fp8")
MXFP4_KEY = KeyLayout(64, 128, "mxfp4")
CASES = [
    Case("window-row", RowLayout(128, 64, 64, "fp8"), 1, 1, 64),
    Case("c4-row", FLASH, 3, 8, 64, absent=True),
    Case("c4-key", KEY, 3, 8, 64, absent=True),
    Case("c128-row", RowLayout(2, 64, 64, "fp8"), 3, 128, 64),
    Case("odd-tokens-no-rope", RowLayout(3, 96, 32, "fp8"), 5, 63, 0),
    Case("narrow-key", KeyLayout(5, 64, "fp8"), 9, 7, 32),
    Case("c4-mxfp4-key", MXFP4_KEY, 3, 8, 64, absent=True),
    Case("narrow-mxfp4-key", KeyLayout(5, 64, "mxfp4"), 9, 7, 32),
    Case("three-hundred-dims", RowLayout(4, 256, 44, "fp8"), 2, 3, 44),
    Case("no-rows", FLASH, 0, 8, 64),
    Case("prefill-c4-rows", FLASH, 1024, 8, 64, absent=True, gpu=True),
    Case("prefill-c4-keys", KEY, 1024, 8, 64, absent=True, gpu=True),
    Case("prefill-c4-mxfp4-keys", MXFP4_KEY, 1024, 8, 64, absent=True, gpu=True),
    Case("prefill-c128-rows", RowLayout(2, 448, 64, "fp8"), 129, 128, 64, gpu=True),
    Case("window-rows", RowLayout(128, 448, 64, "fp8"), 63, 1, 64, gpu=True),
]


@dataclass(frozen=True)
class Call:
    """Arguments of one call."""

    kv: Tensor
    gate: Tensor
    norm_weight: Tensor
    cos: Tensor
    sin: Tensor
    slots: Tensor
    angle: Tensor


def make(case: Case, generator: torch.Generator) -> Call:
    """Every third slot is skipped; tokens that are not there hold NaN and a gate of -inf."""
    rand = partial(torch.randn, generator=generator)
    dims = case.layout.dims
    kv, gate = rand(case.rows, case.tokens, dims), rand(case.rows, case.tokens, dims) * 3
    if case.absent:
        kv[::2, : case.tokens // 2] = float("nan")
        gate[::2, : case.tokens // 2] = float("-inf")
    blocks = -(-case.rows // case.layout.entries) + 2
    slots = torch.randperm(blocks * case.layout.entries, generator=generator)[: case.rows]
    slots[1::3] = -1
    slots[4::6] = -(2**63)
    angle = rand(case.rows, case.rope_dims // 2) * 100
    return Call(kv, gate, rand(dims), angle.cos(), angle.sin(), slots, angle)


def pool_for(case: Case, device: torch.device | str = "cpu") -> RowPool | KeyPool:
    """Two blocks more than the rows need, all NaN."""
    blocks = -(-case.rows // case.layout.entries) + 2
    block_bytes = -(-case.layout.plane_bytes // 8) * 8 + 16
    data = torch.full((blocks, block_bytes), 0xFF, dtype=torch.uint8, device=device)
    return (
        RowPool(data, 8, case.layout) if isinstance(case.layout, RowLayout) else KeyPool(data, 8, case.layout)
    )


def store(
    op: Callable[..., None],
    call: Call,
    pool: RowPool | KeyPool,
    rope_dims: int,
    device: torch.device | str = "cpu",
) -> None:
    """Call an implementation."""
    inputs = (call.kv, call.gate, call.norm_weight, call.cos, call.sin)
    moved = [tensor.to(device) for tensor in inputs]
    op(*moved, pool, call.slots.to(device), rope_dims=rope_dims, eps=EPS)


def entry_by_hand(call: Call, row: int, *, rope_dims: int, rotated: bool) -> list[float]:
    """One entry in Python floats: softmax, sum, norm, complex rotation, Hadamard matrix."""
    kv, gate = call.kv[row].tolist(), call.gate[row].tolist()
    dims = len(kv[0])
    pooled = []
    for channel in range(dims):
        weights = [math.exp(token[channel]) for token in gate]
        real = [(w, kv[t][channel]) for t, w in enumerate(weights) if w > 0]
        pooled.append(sum(w * value for w, value in real) / sum(weights))
    rms = math.sqrt(sum(x * x for x in pooled) / dims + EPS)
    x = [value / rms * weight for value, weight in zip(pooled, call.norm_weight.tolist(), strict=True)]
    for pair, angle in enumerate(call.angle[row].tolist()):
        at = dims - rope_dims + 2 * pair
        turned = complex(x[at], x[at + 1]) * cmath.exp(1j * angle)
        x[at], x[at + 1] = turned.real, turned.imag
    if not rotated:
        return x
    return [
        sum(-value if bin(i & j).count("1") % 2 else value for i, value in enumerate(x)) / math.sqrt(dims)
        for j in range(dims)
    ]


HAND = [case for case in CASES if not case.gpu]
STEPS: dict[KeyFormat, tuple[float, float]] = {
    "fp32": (2e-5, 2e-5 / 32),
    "fp8": (2**-4, 2**-9),  # half a step of 3 mantissa bits; of the smallest codes
    "mxfp4": (2**-2, 2**-4),  # half a step of 1 mantissa bit; half of 0.5 where the largest is above 3
}
"""Relative error, and error as a share of the entry's largest value."""


def in_format(layout: RowLayout | KeyLayout, data_format: Format | KeyFormat) -> RowLayout | KeyLayout:
    """The same dims in another format; rows know no mxfp4 and stay fp8."""
    if isinstance(layout, KeyLayout):
        return KeyLayout(layout.entries, layout.dims, data_format)
    row_format: Format = "fp32" if data_format == "fp32" else "fp8"
    return RowLayout(layout.entries, layout.nope_dims, layout.rope_dims, row_format)


@pytest.mark.parametrize("plain", [True, False], ids=["fp32", "quantised"])
@pytest.mark.parametrize("case", HAND, ids=lambda case: case.id)
def test_reference_equals_the_definition(case: Case, plain: bool, generator: torch.Generator) -> None:
    call = make(case, generator)
    stored = in_format(case.layout, "fp32") if plain else case.layout
    pool = pool_for(Case(case.id, stored, case.rows, case.tokens, case.rope_dims))
    store(compress_quantize, call, pool, case.rope_dims)
    rotated = isinstance(stored, KeyLayout) and not plain
    for row, slot in enumerate(call.slots.tolist()):
        if slot < 0:
            continue
        got = load_rows(pool, torch.tensor(slot))
        want = torch.tensor(entry_by_hand(call, row, rope_dims=case.rope_dims, rotated=rotated))
        rtol, share = STEPS[stored.format]
        torch.testing.assert_close(got, want, rtol=rtol * 1.001, atol=want.abs().max().item() * share)
    untouched = torch.ones(pool.num_slots, dtype=torch.bool)
    untouched[call.slots[call.slots >= 0]] = False
    for view in (pool.values, pool.scales):
        assert (view.flatten(0, 1)[untouched] == 0xFF).all()


def ordered(codes: Tensor) -> Tensor:
    """Sign-magnitude codes i32 -> integers in value order; both zeros are 0."""
    sign = 1 << (8 if codes.dtype == torch.uint8 else 16) - 1
    wide = codes.to(torch.int32) & (2 * sign - 1)
    return torch.where(wide >= sign, sign - wide, wide)


def code_distance(got: Tensor, want: Tensor, layout: RowLayout | KeyLayout) -> Tensor:
    """Steps between stored values u8 [n, value_bytes], code by code."""
    if layout.format == "mxfp4":
        sides = (torch.stack((side & 15, side >> 4), dim=2).flatten(1).int() for side in (got, want))
        e2m1_got, e2m1_want = (torch.where(code > 7, 8 - code, code) for code in sides)
        return (e2m1_got - e2m1_want).abs()
    split = layout.nope_dims if isinstance(layout, RowLayout) else layout.dims
    codes = (ordered(got[:, :split]) - ordered(want[:, :split])).abs()
    rope_got, rope_want = (side[:, split:].contiguous().view(torch.int16) for side in (got, want))
    return torch.cat((codes, (ordered(rope_got) - ordered(rope_want)).abs()), dim=1)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.id, marks=[pytest.mark.gpu] * case.gpu) for case in CASES]
)
def test_kernel_stores_the_references_bytes(
    case: Case, device: torch.device, generator: torch.Generator
) -> None:
    call = make(case, generator)
    want, got = pool_for(case), pool_for(case, device)
    store(reference.compress_quantize, call, want, case.rope_dims)
    run = compress_quantize if device.type == "cuda" else kernel.compress_quantize
    store(run, call, got, case.rope_dims, device)
    assert torch.equal(got.scales.cpu(), want.scales)
    steps = code_distance(got.values.cpu().flatten(0, 1), want.values.flatten(0, 1), case.layout)
    assert steps.max() <= 1
    assert (steps > 0).float().mean() <= CODE_FLIPS


def test_slot_past_the_pool_stores_nothing_on_the_kernel(
    device: torch.device, generator: torch.Generator
) -> None:
    case = CASES[0]
    call = make(case, generator)
    pool = pool_for(case, device)
    for slot in (pool.num_slots, 2**62):
        call.slots[:] = slot
        store(kernel.compress_quantize, call, pool, case.rope_dims, device)
    assert (pool.bytes == 0xFF).all()
