"""prefill_attention: selected or all closed rows and the window, causal, equal to decode token by token."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from forepage_kernels.layout import RowLayout, RowPool, store_rows
from forepage_kernels.prefill_attention import kernel, prefill_attention, reference
from forepage_kernels.sparse_decode import sparse_decode

Check = Callable[[Tensor, Tensor], None]
NanOutputs = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Case:
    """`tokens` from `start` on; `selected` of the entries closed at each (None: all of them)."""

    id: str
    tokens: int
    start: int
    heads: int
    dims: int
    ratio: int
    selected: int | None
    window: int
    dtype: torch.dtype = torch.float32
    gpu: bool = False


CASES = [
    Case("first-token", 1, 0, 1, 64, 4, 3, 1),
    Case("window-only", 9, 5, 3, 64, 4, 0, 4),
    Case("from-the-start", 13, 0, 5, 64, 4, 2, 8),
    Case("selected", 6, 203, 8, 128, 4, 33, 63),
    Case("all-closed", 19, 380, 8, 128, 128, None, 127),
    Case("nothing-closed", 5, 3, 2, 64, 128, None, 8),
    Case("odd-heads", 3, 90, 17, 64, 4, 9, 11),
    Case("three-hundred-dims", 2, 70, 2, 300, 4, 5, 6),
    Case("tiny-c4", 512, 8_000, 8, 128, 4, 512, 128, torch.bfloat16, gpu=True),
    Case("tiny-c4-f32", 96, 8_001, 8, 128, 4, 512, 128, gpu=True),
    Case("tiny-c128", 512, 8_000, 8, 128, 128, None, 128, torch.bfloat16, gpu=True),
    Case("flash-c4", 200, 4_100, 64, 512, 4, 512, 128, torch.bfloat16, gpu=True),
    Case("flash-c4-f32", 40, 4_100, 64, 512, 4, 512, 128, gpu=True),
    Case("flash-c128", 200, 60_001, 64, 512, 128, None, 128, torch.bfloat16, gpu=True),
    Case("flash-window", 300, 0, 64, 512, 4, 0, 128, torch.bfloat16, gpu=True),
    Case("pro-c4", 40, 9_999, 128, 512, 4, 2_048, 128, torch.bfloat16, gpu=True),
]


@dataclass(frozen=True)
class Call:
    """Arguments of one call."""

    q: Tensor
    rows: Tensor
    selected: Tensor | None
    window: Tensor
    sinks: Tensor
    start: int
    ratio: int
    window_tokens: int

    def to(self, device: torch.device) -> "Call":
        """The same there."""
        moved = {name: getattr(self, name).to(device) for name in ("q", "rows", "window", "sinks")}
        return replace(self, **moved, selected=None if self.selected is None else self.selected.to(device))


def make(case: Case, generator: torch.Generator) -> Call:
    """Rows that no token may attend are NaN; selections are ascending, -1 behind them."""
    rand = partial(torch.randn, generator=generator)
    end, before = case.start + case.tokens, min(case.start, case.window - 1)
    closed = end // case.ratio if case.selected != 0 else 0
    rows = rand(closed + 2 if case.selected != 0 else 0, case.dims)
    rows[closed:] = float("nan")
    selected = None
    if case.selected is not None:
        selected = torch.full((case.tokens, case.selected), -1)
        for token, listed in enumerate(selected):
            entries = torch.randperm((case.start + token + 1) // case.ratio, generator=generator)
            entries = entries[: case.selected].sort().values
            listed[: len(entries)] = entries
    return Call(
        q=rand(case.tokens, case.heads, case.dims).to(case.dtype),
        rows=rows.to(case.dtype),
        selected=selected,
        window=rand(before + case.tokens, case.dims).to(case.dtype),
        sinks=rand(case.heads),
        start=case.start,
        ratio=case.ratio,
        window_tokens=case.window,
    )


def attend(op: Callable[..., Tensor], call: Call) -> Tensor:
    """Call an implementation."""
    return op(
        call.q,
        call.rows,
        call.selected,
        call.window,
        call.sinks,
        start=call.start,
        ratio=call.ratio,
        window_tokens=call.window_tokens,
        softmax_scale=call.q.shape[2] ** -0.5,
    )


def stored(rows: Tensor) -> RowPool:
    """A pool of fp32 rows: row i at slot i."""
    layout = RowLayout(1, rows.shape[1], 0, "fp32")
    pool = RowPool(torch.zeros(max(1, len(rows)), layout.plane_bytes, dtype=torch.uint8), 0, layout)
    store_rows(pool, torch.arange(len(rows)), rows)
    return pool


def decoded_one_by_one(call: Call) -> Tensor:
    """The same by `sparse_decode`: each token with its own lists of rows, all in fp32."""
    tokens = torch.arange(call.q.shape[0])
    before = call.window.shape[0] - len(tokens)
    age = before + tokens.unsqueeze(1) - torch.arange(call.window.shape[0])
    window_slots = torch.where((age >= 0) & (age < call.window_tokens), torch.arange(age.shape[1]), -1)
    if call.selected is None:
        closed = (call.start + tokens + 1).unsqueeze(1) // call.ratio
        entries = torch.arange(call.rows.shape[0]).expand(len(tokens), -1)
        slots = torch.where(entries < closed, entries, -1)
    else:
        slots = call.selected
    return sparse_decode(
        call.q.float(),
        stored(call.rows.float()) if slots.shape[1] else None,
        slots,
        stored(call.window.float()),
        window_slots,
        call.sinks,
        softmax_scale=call.q.shape[2] ** -0.5,
    )


SMALL = [case for case in CASES if not case.gpu]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_reference_equals_decode_token_by_token(
    case: Case, generator: torch.Generator, assert_close: Check
) -> None:
    call = make(case, generator)
    assert_close(attend(prefill_attention, call), decoded_one_by_one(call))


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.id, marks=[pytest.mark.gpu] * case.gpu) for case in CASES]
)
def test_kernel_equals_the_reference(
    case: Case,
    device: torch.device,
    generator: torch.Generator,
    assert_close: Check,
    nan_outputs: NanOutputs,
) -> None:
    call = make(case, generator)
    run = prefill_attention if device.type == "cuda" else kernel.prefill_attention
    with nan_outputs():
        got = attend(run, call.to(device))
    # At real sizes the reference runs on the GPU too, in fp32.
    want = attend(reference.prefill_attention, call.to(device) if case.gpu else call)
    assert got.dtype == case.dtype
    assert_close(got, want)


def test_a_selection_beyond_the_closed_entries_is_not_attended(
    device: torch.device, generator: torch.Generator
) -> None:
    call = make(CASES[3], generator)
    assert call.selected is not None
    wild = call.selected.clone()
    wild[:, -1] = torch.tensor([2**62, -(2**63), call.rows.shape[0], call.rows.shape[0] - 1, 10**6, -7])
    clean = wild.clone()
    clean[:, -1] = -1
    got = attend(kernel.prefill_attention, replace(call, selected=wild).to(device))
    want = attend(reference.prefill_attention, replace(call, selected=clean))
    torch.testing.assert_close(got.cpu(), want, rtol=2e-5, atol=2e-5)
    assert torch.equal(attend(reference.prefill_attention, replace(call, selected=wild)), want)
