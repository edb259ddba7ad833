"""native_indexer: scores of the visible resident entries, -inf elsewhere, and no byte read elsewhere."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from forepage_kernels.layout import KeyFormat, KeyLayout, KeyPool, load_rows, store_rows
from forepage_kernels.native_indexer import kernel, native_indexer, reference

Check = Callable[[Tensor, Tensor], None]
NanOutputs = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Case:
    """`resident` of each sequence's blocks are in the pool; `visible` entries may be scored."""

    id: str
    batch: int
    heads: int
    dims: int
    entries: int
    blocks: int
    resident: float
    visible: tuple[int, ...]
    gpu: bool = False


CASES = [
    Case("one-entry", 1, 1, 64, 1, 1, 1.0, (1,)),
    Case("nothing-visible", 2, 5, 64, 64, 2, 1.0, (0, 128)),
    Case("nothing-resident", 2, 3, 128, 64, 2, 0.0, (128, 63)),
    Case("no-blocks", 1, 3, 128, 64, 0, 0.0, (0,)),
    Case("odd-block", 2, 4, 64, 3, 43, 0.5, (129, 100)),
    Case("half-resident", 3, 33, 128, 64, 5, 0.5, (320, 63, 257)),
    Case("flash-64k", 4, 64, 128, 64, 256, 0.3, (16_384, 1, 16_383, 9_001), gpu=True),
    Case("flash-1m", 1, 64, 128, 64, 4096, 1.0, (262_143,), gpu=True),
    Case("flash-1m-paged", 12, 64, 128, 64, 4096, 0.08, (262_144,) * 11 + (100_003,), gpu=True),
    Case("full-heads", 2, 128, 128, 64, 64, 0.9, (4096, 4000), gpu=True),
]


@dataclass(frozen=True)
class Call:
    """Arguments of one call."""

    q: Tensor
    weights: Tensor
    pool: KeyPool
    block_table: Tensor
    visible: Tensor

    def to(self, device: torch.device) -> "Call":
        """The same arguments there."""
        pool = KeyPool(self.pool.bytes.to(device), self.pool.layer_offset, self.pool.layout)
        return Call(
            self.q.to(device),
            self.weights.to(device),
            pool,
            self.block_table.to(device),
            self.visible.to(device),
        )


def make(case: Case, generator: torch.Generator, key_format: KeyFormat = "fp8") -> Call:
    """Resident blocks lie shuffled in a pool whose every other byte, invisible entries too, is NaN."""
    rand = partial(torch.randn, generator=generator)
    layout = KeyLayout(case.entries, case.dims, key_format)
    block_bytes = -(-layout.plane_bytes // 8) * 8 + 16
    table = torch.randperm(case.batch * case.blocks, generator=generator).to(torch.int32) + 1
    table = table.view(case.batch, case.blocks)
    table[torch.rand(table.shape, generator=generator) >= case.resident] = -1
    pool_bytes = torch.full((case.batch * case.blocks + 2, block_bytes), 0xFF, dtype=torch.uint8)
    pool = KeyPool(pool_bytes, 8, layout)
    entry = torch.arange(case.blocks * case.entries)
    for row, limit in zip(table.long(), case.visible, strict=True):
        slots = (row.unsqueeze(1) * case.entries + torch.arange(case.entries)).flatten()
        readable = (slots >= 0) & (entry < limit)
        store_rows(pool, slots[readable], rand(int(readable.sum()), case.dims))
    weights = rand(case.batch, case.heads) * (case.heads * case.dims) ** -0.5
    visible = torch.tensor(case.visible)
    return Call(rand(case.batch, case.heads, case.dims), weights, pool, table, visible)


def score(op: Callable[..., Tensor], call: Call) -> Tensor:
    """Call an implementation."""
    return op(call.q, call.weights, call.pool, block_table=call.block_table, visible=call.visible)


@pytest.mark.parametrize("key_format", ["fp8", "mxfp4", "fp32"])
@pytest.mark.parametrize("case", CASES[:5], ids=lambda case: case.id)
def test_reference_equals_a_loop_over_entries(
    case: Case, key_format: KeyFormat, generator: torch.Generator, assert_close: Check
) -> None:
    call = make(case, generator, key_format)
    asked = call.q if key_format == "fp32" else call.q.bfloat16()
    want = torch.full((case.batch, case.blocks * case.entries), float("-inf"))
    for b in range(case.batch):
        for n in range(min(case.visible[b], want.shape[1])):
            block_id = int(call.block_table[b, n // case.entries])
            if block_id < 0:
                continue
            slot = torch.tensor(block_id * case.entries + n % case.entries)
            key = load_rows(call.pool, slot).tolist()
            total = 0.0
            for head in range(case.heads):
                dot = sum(x * y for x, y in zip(asked[b, head].tolist(), key, strict=True))
                total += float(call.weights[b, head]) * max(dot, 0.0)
            want[b, n] = total
    assert_close(score(native_indexer, call), want)


@pytest.mark.parametrize("key_format", ["fp8", "mxfp4"])
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.id, marks=[pytest.mark.gpu] * case.gpu) for case in CASES]
)
def test_kernel_equals_the_reference(
    case: Case,
    key_format: KeyFormat,
    device: torch.device,
    generator: torch.Generator,
    assert_close: Check,
    nan_outputs: NanOutputs,
) -> None:
    call = make(case, generator, key_format)
    with nan_outputs():
        got = score(native_indexer if device.type == "cuda" else kernel.native_indexer, call.to(device))
    want = score(reference.native_indexer, call)
    assert torch.equal(got.cpu().isneginf(), want.isneginf())
    assert_close(got, want)


LONG = Case("long", 2, 3, 64, 64, 80, 1.0, (5_000, 700))


@pytest.mark.parametrize("resident", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("case", [CASES[4], CASES[5], LONG], ids=lambda case: case.id)
def test_long_runs_of_tiles_give_the_bits_of_short_ones(
    case: Case,
    resident: float,
    device: torch.device,
    generator: torch.Generator,
    nan_outputs: NanOutputs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = make(replace(case, resident=resident), generator).to(device)
    found = []
    for programs in (1, 3, 10_000):
        monkeypatch.setattr(kernel, "PROGRAMS", programs)
        with nan_outputs():
            found.append(score(kernel.native_indexer, call).cpu())
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])


def test_block_id_past_the_pool_counts_as_absent_on_the_kernel(
    device: torch.device, generator: torch.Generator
) -> None:
    call = make(CASES[1], generator)
    call.block_table[1] = torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32)
    assert score(kernel.native_indexer, call.to(device)).isneginf().all()


@pytest.mark.parametrize("key_format", ["fp8", "mxfp4"])
def test_keys_that_are_not_numbers_score_nan_on_both(
    key_format: KeyFormat, device: torch.device, generator: torch.Generator
) -> None:
    call = make(Case("three-blocks", 1, 5, 64, 64, 3, 1.0, (192,)), generator, key_format)
    call.pool.bytes[call.block_table[0, 1].long()] = 0xFF
    for got in (score(reference.native_indexer, call), score(kernel.native_indexer, call.to(device)).cpu()):
        assert got.isnan().view(3, 64).all(1).tolist() == [False, True, False]
        assert got.isfinite().view(3, 64).all(1).tolist() == [True, False, True]
