"""memory_indexer: gated lookahead probabilities over planes anywhere in flat bytes."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from forepage_kernels.layout import KeyFormat, KeyLayout, KeyPool, load_rows, store_rows
from forepage_kernels.memory_indexer import kernel, memory_indexer, reference

Check = Callable[[Tensor, Tensor], None]
NanOutputs = Callable[[], AbstractContextManager[None]]
MARGIN = 1e-4
"""Nearer to the threshold than this, rounding may decide on which side a score falls."""


@dataclass(frozen=True)
class Case:
    """`present` of each sequence's planes exist."""

    id: str
    batch: int
    layers: int
    heads: int
    dims: int
    entries: int
    blocks: int
    present: float
    threshold: float = 0.5
    dtype: torch.dtype = torch.float32
    gpu: bool = False


CASES = [
    Case("one-entry", 1, 1, 1, 64, 1, 1, 1.0),
    Case("all-absent", 2, 2, 3, 64, 64, 2, 0.0),
    Case("odd-block", 2, 3, 5, 64, 3, 43, 0.5),
    Case("no-blocks", 1, 2, 3, 128, 64, 0, 0.0),
    Case("threshold-out-of-reach", 1, 1, 5, 64, 63, 1, 1.0, threshold=1.0),
    Case("two-layers-129-heads", 1, 2, 129, 128, 64, 2, 0.7),
    Case("bf16-queries", 1, 2, 16, 128, 64, 2, 0.7, dtype=torch.bfloat16),
    Case("three-layers-64k", 2, 3, 128, 128, 64, 256, 0.8, gpu=True),
    Case("three-layers-64k-bf16", 2, 3, 128, 128, 64, 256, 0.8, dtype=torch.bfloat16, gpu=True),
    Case("odd-million", 1, 2, 100, 128, 63, 4001, 0.9, dtype=torch.bfloat16, gpu=True),
    Case("one-layer-1m-bf16", 1, 1, 64, 128, 64, 4096, 1.0, dtype=torch.bfloat16, gpu=True),
]


@dataclass(frozen=True)
class Call:
    """Arguments of one call; `pool` sees the same bytes as `keys` by slot."""

    queries: Tensor
    weights: Tensor
    keys: Tensor
    layout: KeyLayout
    plane_offsets: Tensor
    threshold: float
    pool: KeyPool


def make(case: Case, generator: torch.Generator, key_format: KeyFormat = "fp8") -> Call:
    """Planes of one layer and block lie scattered between NaN bytes; absent ones were never written."""
    rand = partial(torch.randn, generator=generator)
    layout = KeyLayout(case.entries, case.dims, key_format)
    planes = case.batch * case.blocks * case.layers
    block_bytes = -(-layout.plane_bytes // 8) * 8 + 24
    pool = KeyPool(torch.full((planes + 1, block_bytes), 0xFF, dtype=torch.uint8), 16, layout)
    ids = torch.randperm(planes, generator=generator).view(case.batch, case.blocks, case.layers)
    ids[torch.rand(ids.shape, generator=generator) >= case.present] = -1
    written = ids[ids >= 0].flatten()
    slots = (written.unsqueeze(1) * case.entries + torch.arange(case.entries)).flatten()
    store_rows(pool, slots, rand(slots.shape[0], case.dims))
    absent = torch.tensor([-1, -(2**63)])[torch.randint(0, 2, ids.shape, generator=generator)]
    offsets = torch.where(ids < 0, absent, ids * block_bytes + 16)
    queries = rand(case.batch, case.layers, case.heads, case.dims).to(case.dtype)
    weights = rand(case.batch, case.layers, case.heads) * (case.heads * case.dims) ** -0.5
    return Call(queries, weights, pool.bytes.flatten(), layout, offsets, case.threshold, pool)


def score(op: Callable[..., Tensor], call: Call, device: torch.device | str = "cpu") -> Tensor:
    """Call an implementation; the keys stay where they are."""
    return op(
        call.queries.to(device),
        call.weights.to(device),
        call.keys,
        layout=call.layout,
        plane_offsets=call.plane_offsets.to(device),
        threshold=call.threshold,
    )


def loop(case: Case, call: Call) -> Tensor:
    """The definition, one entry and head at a time."""
    asked = call.queries if call.layout.format == "fp32" else call.queries.bfloat16()
    want = torch.zeros(case.batch, case.blocks * case.entries)
    for b, m, layer in torch.cartesian_prod(*(torch.arange(n) for n in call.plane_offsets.shape)).tolist():
        offset = int(call.plane_offsets[b, m, layer])
        for entry in range(case.entries if offset >= 0 else 0):
            slot = offset // call.pool.block_bytes * case.entries + entry
            key = load_rows(call.pool, torch.tensor(slot)).tolist()
            total = 0.0
            for query, weight in zip(asked[b, layer], call.weights[b, layer].tolist(), strict=True):
                total += weight * max(sum(x * y for x, y in zip(query.tolist(), key, strict=True)), 0.0)
            p = 1 / (1 + math.exp(-total))
            n = m * case.entries + entry
            want[b, n] = max(float(want[b, n]), p if p > case.threshold else 0.0)
    return want


@pytest.mark.parametrize("key_format", ["fp8", "mxfp4", "fp32"])
@pytest.mark.parametrize("case", CASES[:5], ids=lambda case: case.id)
def test_reference_equals_a_loop_over_entries(
    case: Case, key_format: KeyFormat, generator: torch.Generator, assert_close: Check
) -> None:
    call = make(case, generator, key_format)
    assert_close(score(memory_indexer, call), loop(case, call))


def zero_query() -> Call:
    """Every score is sigmoid(0) = 0.5 exactly."""
    call = make(Case("zero-query", 1, 1, 2, 64, 4, 1, 1.0), torch.Generator().manual_seed(0))
    return replace(call, queries=torch.zeros_like(call.queries))


def test_reference_gates_out_a_score_equal_to_the_threshold() -> None:
    assert torch.equal(score(memory_indexer, zero_query()), torch.zeros(1, 4))
    assert torch.equal(score(memory_indexer, replace(zero_query(), threshold=0.499)), torch.full((1, 4), 0.5))


def test_kernel_gates_out_a_score_equal_to_the_threshold(device: torch.device) -> None:
    call = zero_query()
    call = replace(call, keys=call.keys.to(device))
    assert torch.equal(score(kernel.memory_indexer, call, device).cpu(), torch.zeros(1, 4))
    below = replace(call, threshold=0.499)
    assert torch.equal(score(kernel.memory_indexer, below, device).cpu(), torch.full((1, 4), 0.5))


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
    register_arena: Callable[[Tensor], Tensor],
) -> None:
    call = make(case, generator, key_format)
    register_arena(call.pool.bytes)
    with nan_outputs():
        got = score(memory_indexer if device.type == "cuda" else kernel.memory_indexer, call, device).cpu()
    ungated = score(reference.memory_indexer, replace(call, threshold=-1.0))
    clear = (ungated - case.threshold).abs() > MARGIN
    assert_close(got[clear], torch.where(ungated > case.threshold, ungated, 0.0)[clear])
    assert_close(torch.where(got > 0, got, ungated), ungated)


STREAMED = [
    case for case in CASES if case.id in ("odd-block", "bf16-queries", "three-layers-64k", "odd-million")
]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.id, marks=[pytest.mark.gpu] * case.gpu) for case in STREAMED]
)
def test_how_many_tiles_a_program_takes_changes_no_bit(
    case: Case, device: torch.device, generator: torch.Generator, assert_close: Check, nan_outputs: NanOutputs
) -> None:
    call = make(case, generator)
    call = replace(call, keys=call.keys.to(device), threshold=-1.0)
    with nan_outputs():
        few, some, many = (
            score(partial(kernel.memory_indexer, stream=kernel.Stream(programs=count)), call, device)
            for count in (1, 7, 1 << 20)
        )
        by_tile = score(partial(kernel.memory_indexer, stream=None), call, device)
    assert torch.equal(few, some)
    assert torch.equal(few, many)
    assert_close(few, by_tile)


def test_kernel_reads_keys_of_gpu_memory_too(
    device: torch.device, generator: torch.Generator, assert_close: Check
) -> None:
    call = make(CASES[5], generator)
    resident = replace(call, keys=call.keys.to(device), threshold=-1.0)
    want = score(reference.memory_indexer, replace(call, threshold=-1.0))
    assert_close(score(kernel.memory_indexer, resident, device), want)


def test_plane_that_leaves_the_keys_counts_as_absent_on_the_kernel(
    device: torch.device, generator: torch.Generator
) -> None:
    call = make(CASES[0], generator)
    past = replace(call, keys=call.keys.to(device), plane_offsets=call.plane_offsets + call.keys.shape[0])
    assert (score(kernel.memory_indexer, past, device) == 0).all()
