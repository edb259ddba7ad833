"""gather_rows: both spans of a row (values, scales) move, bit for bit, and nothing else does."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from forepage_kernels.gather_rows import gather_rows, kernel, reference
from forepage_kernels.layout import RowLayout, RowPool

FLASH = RowLayout(64, 448, 64, "fp8")
SEEDED = RowLayout(64, 64, 64, "fp8")


@dataclass(frozen=True)
class Case:
    """How many rows move out of how many planes; every third entry is skipped if `absent`."""

    id: str
    layout: RowLayout
    rows: int
    pool_blocks: int
    planes: int
    absent: bool = False
    gpu: bool = False


CASES = [
    Case("one-row", SEEDED, 1, 1, 1),
    Case("flash-63", FLASH, 63, 3, 2, absent=True),
    Case("half-group-129", RowLayout(3, 96, 32, "fp8"), 129, 60, 40, absent=True),
    Case("fp32-rows", RowLayout(5, 64, 64, "fp32"), 7, 2, 3, absent=True),
    Case("no-rows", FLASH, 0, 1, 1),
    Case("flash-topk-of-8-sequences", FLASH, 8 * 512, 80, 400, absent=True, gpu=True),
    Case("pro-topk", FLASH, 1024, 17, 64, gpu=True),
]


@dataclass(frozen=True)
class Call:
    """Arguments of one call."""

    pool: RowPool
    arena: Tensor
    slots: Tensor
    plane_offsets: Tensor
    entries: Tensor


def make(case: Case, generator: torch.Generator) -> Call:
    """Random bytes in the arena, 0xFF (NaN) in the pool; planes lie 16 bytes apart from each other."""
    layout = case.layout
    stride = layout.plane_bytes // 8 * 8 + 24
    arena = torch.randint(0, 256, (case.planes * stride + 8,), dtype=torch.uint8, generator=generator)
    pool = torch.full((case.pool_blocks, layout.plane_bytes // 8 * 8 + 40), 0xFF, dtype=torch.uint8)
    slots = torch.randperm(case.pool_blocks * layout.entries, generator=generator)[: case.rows].clone()
    planes = torch.randint(0, case.planes, (case.rows,), generator=generator)
    entries = torch.randint(0, layout.entries, (case.rows,), generator=generator)
    offsets = planes * stride + 8
    if case.absent:
        slots[::3], offsets[::3], entries[::3] = -1, 2**62, -(2**63)
    return Call(RowPool(pool, 24, layout), arena, slots, offsets, entries)


def expected(call: Call) -> Tensor:
    """The pool after the call, byte range by byte range."""
    layout, out = call.pool.layout, call.pool.bytes.clone()
    values, scales = layout.value_bytes, layout.scale_bytes
    rows = zip(call.slots.tolist(), call.plane_offsets.tolist(), call.entries.tolist(), strict=True)
    for slot, plane, entry in rows:
        if slot < 0:
            continue
        block, place = divmod(slot, layout.entries)
        target = call.pool.layer_offset + place * values
        out[block, target : target + values] = call.arena[plane + entry * values :][:values]
        target = call.pool.layer_offset + layout.entries * values + place * scales
        source = plane + layout.entries * values + entry * scales
        out[block, target : target + scales] = call.arena[source : source + scales]
    return out


@pytest.mark.parametrize("case", [case for case in CASES if not case.gpu], ids=lambda case: case.id)
def test_reference_moves_values_and_scales(case: Case, generator: torch.Generator) -> None:
    call = make(case, generator)
    want = expected(call)
    gather_rows(
        call.pool, call.arena, slots=call.slots, plane_offsets=call.plane_offsets, entries=call.entries
    )
    assert torch.equal(call.pool.bytes, want)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.id, marks=[pytest.mark.gpu] * case.gpu) for case in CASES]
)
def test_kernel_moves_the_same_bytes(
    case: Case,
    device: torch.device,
    generator: torch.Generator,
    register_arena: Callable[[Tensor], Tensor],
) -> None:
    call = make(case, generator)
    moved = RowPool(call.pool.bytes.to(device, copy=True), call.pool.layer_offset, case.layout)
    run = gather_rows if device.type == "cuda" else kernel.gather_rows
    run(
        moved,
        register_arena(call.arena),
        slots=call.slots.to(device),
        plane_offsets=call.plane_offsets.to(device),
        entries=call.entries.to(device),
    )
    reference.gather_rows(
        call.pool, call.arena, slots=call.slots, plane_offsets=call.plane_offsets, entries=call.entries
    )
    assert torch.equal(moved.bytes.cpu(), call.pool.bytes)


def test_reference_reads_offsets_that_are_not_lanes(generator: torch.Generator) -> None:
    call = make(CASES[1], generator)
    shifted = torch.cat((call.arena.new_zeros(3), call.arena))
    want = expected(call)
    reference.gather_rows(
        call.pool, shifted, slots=call.slots, plane_offsets=call.plane_offsets + 3, entries=call.entries
    )
    assert torch.equal(call.pool.bytes, want)


def test_kernel_stays_inside_both_buffers(device: torch.device) -> None:
    layout = RowLayout(2, 64, 64, "fp8")
    pool = RowPool(torch.full((2, 400), 0xFF, dtype=torch.uint8, device=device), 0, layout)
    arena = torch.zeros(400, dtype=torch.uint8, device=device)
    slots = torch.tensor([4, 2**40, 0, 1, 2, 3, 0], device=device)
    offsets = torch.tensor([0, 0, 8, -8, 0, 0, -1], device=device)
    entries = torch.tensor([0, 0, 0, 0, 2, -1, 0], device=device)
    kernel.gather_rows(pool, arena, slots=slots, plane_offsets=offsets, entries=entries)
    assert (pool.bytes == 0xFF).all()


def test_offset_past_the_arena_raises_on_the_cpu() -> None:
    layout = RowLayout(2, 64, 64, "fp8")
    pool = RowPool(torch.zeros(2, 400, dtype=torch.uint8), 0, layout)
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(IndexError):
        gather_rows(
            pool, torch.zeros(399, dtype=torch.uint8), slots=one, plane_offsets=one + 400, entries=one
        )
