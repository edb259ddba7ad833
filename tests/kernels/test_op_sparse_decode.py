"""sparse_decode: attention over the listed rows with a sink, blind to where the rows lie."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from forepage_kernels.layout import Format, RowLayout, RowPool, load_rows, store_rows
from forepage_kernels.sparse_decode import kernel, reference, sparse_decode

Check = Callable[[Tensor, Tensor], None]
NanOutputs = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Case:
    """Per sequence: how many of the K compressed and W window slots are rows; the rest is -1 behind them."""

    id: str
    heads: int
    nope: int
    rope: int
    width: int
    window: int
    rows: tuple[int, ...]
    window_rows: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    gpu: bool = False
    entries: int = 64
    overlapped: bool = False
    """By the kernel that only Hopper has: rows begin on multiples of 16."""


def overlapped(id: str, heads: int, rows: tuple[int, ...], window_rows: tuple[int, ...]) -> Case:
    width, window = max(rows), max(window_rows)
    entries = 2 if "c128" in id else 64
    return Case(
        f"overlapped-{id}",
        heads,
        448,
        64,
        width,
        window,
        rows,
        window_rows,
        torch.bfloat16,
        gpu=True,
        entries=entries,
        overlapped=True,
    )


CASES = [
    Case("one-window-row", 1, 64, 64, 0, 1, (0,), (1,)),
    Case("no-row-at-all", 3, 64, 64, 5, 4, (0, 2), (0, 4)),
    Case("no-lists", 3, 64, 64, 0, 0, (0,), (0,)),
    Case("compressed-only", 5, 96, 32, 63, 2, (63, 1), (0, 0)),
    Case("odd-lists", 17, 64, 64, 129, 63, (129, 64, 1), (1, 63, 33)),
    Case("flash-row", 4, 448, 64, 40, 7, (33, 40), (7, 7)),
    Case("three-parts", 3, 64, 64, 700, 40, (700, 330, 10), (40, 0, 7)),
    Case("three-hundred-dims", 2, 256, 44, 3, 3, (3,), (2,)),
    Case("flash-c4", 64, 448, 64, 512, 128, (512, 300, 1, 0), (128, 128, 7, 128), gpu=True),
    Case(
        "flash-c4-bf16", 64, 448, 64, 512, 128, (512, 300, 1, 0), (128, 128, 7, 128), torch.bfloat16, gpu=True
    ),
    Case("pro-c4-bf16", 128, 448, 64, 2048, 128, (2048, 1024), (128, 128), torch.bfloat16, gpu=True),
    Case("flash-c128-1m", 64, 448, 64, 8192, 128, (8192,), (128,), torch.bfloat16, gpu=True),
    Case("flash-window-bf16", 64, 448, 64, 0, 128, (0, 0), (128, 1), torch.bfloat16, gpu=True),
    Case("seeded", 4, 64, 64, 32, 128, (32, 5), (128, 9), gpu=True),
    overlapped("c4", 64, (512, 300, 1, 0), (128, 128, 7, 128)),
    overlapped("odd", 17, (129, 64, 1, 0, 65), (1, 63, 33, 0, 0)),
    overlapped("one-head", 1, (63, 0), (1, 65)),
    overlapped("window", 64, (0, 0, 0), (128, 1, 0)),
    overlapped("pro", 128, (2048, 1024), (128, 128)),
    overlapped("parts", 100, (700, 513, 512, 10), (127, 128, 0, 64)),
    overlapped("c128-1m", 64, (8192, 1), (128, 128)),
]


@dataclass(frozen=True)
class Call:
    """Arguments of one call."""

    q: Tensor
    compressed: RowPool | None
    slots: Tensor
    window: RowPool
    window_slots: Tensor
    sinks: Tensor

    def to(self, device: torch.device) -> "Call":
        """The same arguments there."""
        move = partial(move_pool, device=device)
        return Call(
            self.q.to(device),
            move(self.compressed) if self.compressed is not None else None,
            self.slots.to(device),
            move(self.window),
            self.window_slots.to(device),
            self.sinks.to(device),
        )


def move_pool(pool: RowPool, device: torch.device) -> RowPool:
    """A copy of the pool on a device."""
    return RowPool(pool.bytes.to(device, copy=True), pool.layer_offset, pool.layout)


def fill_pool(
    layout: RowLayout, counts: tuple[int, ...], width: int, gen: torch.Generator, *, is_aligned: bool
) -> tuple[RowPool, Tensor]:
    """A pool where only the listed rows are not NaN, scattered, and each sequence's slot list."""
    total = sum(counts)
    num_blocks = 2 * -(-total // layout.entries) + 2
    unit = 16 if is_aligned else 8
    block_bytes = -(-layout.plane_bytes // unit) * unit + 9 * unit
    pool = RowPool(torch.full((num_blocks, block_bytes), 0xFF, dtype=torch.uint8), 5 * unit, layout)
    slots = torch.randperm(num_blocks * layout.entries, generator=gen)[:total]
    store_rows(pool, slots, torch.randn(total, layout.head_dim, generator=gen))
    lists = torch.full((len(counts), width), -1)
    first = 0
    for row, count in zip(lists, counts, strict=True):
        row[:count] = slots[first : first + count]
        row[count + 1 :] = -(2**63)
        first += count
    return pool, lists


def make(case: Case, generator: torch.Generator, row_format: Format = "fp8") -> Call:
    """Inputs of unit scale; sinks of the scores' size."""
    layout = RowLayout(case.entries, case.nope, case.rope, row_format)
    fill = partial(fill_pool, gen=generator, is_aligned=case.overlapped)
    compressed, slots = fill(layout, case.rows, case.width)
    window, window_slots = fill(replace(layout, entries=128), case.window_rows, case.window)
    q = torch.randn(len(case.rows), case.heads, layout.head_dim, generator=generator).to(case.dtype)
    sinks = torch.randn(case.heads, generator=generator)
    return Call(q, compressed if case.width else None, slots, window, window_slots, sinks)


def attend(op: Callable[..., Tensor], call: Call) -> Tensor:
    """Call an implementation."""
    scale = call.q.shape[2] ** -0.5
    return op(
        call.q, call.compressed, call.slots, call.window, call.window_slots, call.sinks, softmax_scale=scale
    )


def dense(call: Call) -> Tensor:
    """Softmax over [scores, sink] of each head in fp64, one sequence at a time; the sink's value is 0."""
    out = torch.zeros(call.q.shape, dtype=torch.float64)
    for b in range(call.q.shape[0]):
        lists = [(call.window, call.window_slots[b])]
        if call.compressed is not None:
            lists.insert(0, (call.compressed, call.slots[b]))
        rows = torch.cat([load_rows(pool, slots[slots >= 0]) for pool, slots in lists]).double()
        for head in range(call.q.shape[1]):
            scores = rows @ call.q[b, head].double() * call.q.shape[2] ** -0.5
            p = torch.softmax(torch.cat((scores, call.sinks[head : head + 1].double())), dim=0)
            out[b, head] = p[:-1] @ rows
    return out


def is_hopper(device: torch.device) -> bool:
    """Whether the kernel that overlaps decoding and products runs there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == kernel.HOPPER


SMALL = [case for case in CASES if not case.gpu]


@pytest.mark.parametrize("row_format", ["fp8", "fp32"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_reference_equals_dense_attention(
    case: Case, row_format: Format, generator: torch.Generator, assert_close: Check
) -> None:
    call = make(case, generator, row_format)
    assert_close(attend(sparse_decode, call), dense(call).float())


def test_one_row_and_a_sink_are_weighed_by_hand() -> None:
    layout = RowLayout(128, 64, 64, "fp32")
    pool = RowPool(torch.zeros(1, layout.plane_bytes, dtype=torch.uint8), 0, layout)
    row = torch.zeros(1, 128)
    row[0, 0] = 2.0
    store_rows(pool, torch.tensor([0]), row)
    q = torch.zeros(1, 2, 128)
    q[0, 1, 0] = 1.0  # scores 0 and 2 * 0.5
    call = Call(
        q, None, torch.zeros(1, 0, dtype=torch.int64), pool, torch.tensor([[0]]), torch.tensor([0.0, -1.0])
    )
    out = sparse_decode(
        call.q, None, call.slots, call.window, call.window_slots, call.sinks, softmax_scale=0.5
    )
    want = [2.0 * 0.5, 2.0 * math.e / (math.e + math.exp(-1))]
    torch.testing.assert_close(out[0, :, 0], torch.tensor(want))
    assert out[0, :, 1:].eq(0).all()


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
    there = call.to(device)
    tile = kernel.tile_of(there.q, there.compressed or there.window, there.window)
    assert tile.overlapped == (case.overlapped and is_hopper(device))
    with nan_outputs():
        got = attend(sparse_decode if device.type == "cuda" else kernel.sparse_decode, there)
    want = attend(reference.sparse_decode, call)
    assert got.dtype == case.dtype
    assert_close(got, want)
    empty = ((call.slots >= 0).sum(1) + (call.window_slots >= 0).sum(1)) == 0
    assert got.cpu()[empty].eq(0).all()


def moved_elsewhere(call: Call, generator: torch.Generator) -> Call:
    """The same rows in the same list order at other slots of another pool, between NaN."""
    assert call.compressed is not None
    pool = call.compressed
    listed = call.slots[call.slots >= 0]
    target = RowPool(
        torch.full((pool.bytes.shape[0] + 3, pool.block_bytes), 0xFF, dtype=torch.uint8), 0, pool.layout
    )
    new = torch.randperm(target.num_slots, generator=generator)[: listed.shape[0]]
    store_rows(target, new, load_rows(pool, listed))
    slots = torch.full((call.slots.shape[0], call.slots.shape[1] + 37), -1)
    slots[:, : call.slots.shape[1]][call.slots >= 0] = new
    return replace(call, compressed=target, slots=slots)


REPLAYED_IDS = ("odd-lists", "three-parts", "flash-c4", "flash-c4-bf16")
REPLAYED = [
    case
    for case in CASES
    if case.id in REPLAYED_IDS or (case.overlapped and case.width and len(case.rows) > 2)
]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.id, marks=[pytest.mark.gpu] * case.gpu) for case in REPLAYED]
)
def test_kernel_depends_on_the_rows_alone_bit_for_bit(
    case: Case, device: torch.device, generator: torch.Generator
) -> None:
    call = make(case, generator)
    first = attend(kernel.sparse_decode, call.to(device))
    again = attend(kernel.sparse_decode, moved_elsewhere(call, generator).to(device))
    assert torch.equal(first, again)
    alone = Call(
        call.q[1:2], call.compressed, call.slots[1:2], call.window, call.window_slots[1:2], call.sinks
    )
    assert torch.equal(first[1:2], attend(kernel.sparse_decode, alone.to(device)))


def test_slot_past_the_pool_counts_as_absent_on_the_kernel(
    device: torch.device, generator: torch.Generator
) -> None:
    call = make(CASES[1], generator)
    past = replace(call, slots=torch.full_like(call.slots, 2**62), window_slots=call.window_slots * 0 + 10**6)
    assert attend(kernel.sparse_decode, past.to(device)).eq(0).all()
