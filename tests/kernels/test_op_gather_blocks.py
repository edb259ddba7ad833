"""gather_blocks: bytes land where asked and nowhere else, from aligned and odd-lane offsets."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from forepage_kernels.gather_blocks import gather_blocks, kernel, reference


@dataclass(frozen=True)
class Case:
    """Copies of one call: ids and byte offsets in the arena."""

    id: str
    block_bytes: int
    num_blocks: int
    arena_bytes: int
    block_ids: tuple[int, ...]
    arena_offsets: tuple[int, ...]
    gpu: bool = False


CASES = [
    Case("one-lane", 8, 1, 8, (0,), (0,)),
    Case("odd-lanes-odd-offsets", 8 * 63, 5, 8 * 200 + 3, (4, 0, 2), (8, 8 * 137, 0)),
    Case("even-lanes-mixed-offsets", 8 * 128, 4, 8 * 500, (3, 1, 0), (16, 8, 8 * 372)),
    Case("several-tiles", 8 * 2049, 3, 8 * 5000, (2, 0), (24, 16 * 100)),
    Case("absent-ids", 8 * 129, 4, 8 * 400, (-1, 2, -(2**63), -7), (-8, 0, 2**62, 8)),
    Case("nothing", 8 * 129, 4, 8 * 400, (), ()),
    Case("all-absent", 8 * 129, 4, 8 * 400, (-1, -1), (-1, -1)),
    Case("record", 987_008, 8, 16 << 20, (7, 0, 3, 5), (0, 4096, 987_008, (16 << 20) - 987_008), gpu=True),
    Case(
        "keys-of-a-record",
        177_408,
        64,
        32 << 20,
        tuple(range(64)),
        tuple(i * 376_840 for i in range(64)),
        gpu=True,
    ),
]


def params() -> list[object]:
    """Cases as pytest parameters, the real sizes marked."""
    return [pytest.param(case, id=case.id, marks=[pytest.mark.gpu] * case.gpu) for case in CASES]


def make(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """pool (poisoned), arena, block_ids, arena_offsets."""
    pool = torch.full((case.num_blocks, case.block_bytes), 0xFF, dtype=torch.uint8)
    arena = torch.randint(0, 256, (case.arena_bytes,), dtype=torch.uint8, generator=generator)
    ids = torch.tensor(case.block_ids, dtype=torch.int64)
    return pool, arena, ids, torch.tensor(case.arena_offsets, dtype=torch.int64)


def expected(case: Case, arena: Tensor) -> list[bytes]:
    """The pool's blocks after the call, by slicing bytes."""
    source = bytes(arena.tolist())
    blocks = [b"\xff" * case.block_bytes] * case.num_blocks
    for block_id, offset in zip(case.block_ids, case.arena_offsets, strict=True):
        if block_id >= 0:
            blocks[block_id] = source[offset : offset + case.block_bytes]
    return blocks


@pytest.mark.parametrize("case", [case for case in CASES if not case.gpu], ids=lambda case: case.id)
def test_reference_copies_the_named_blocks_only(case: Case, generator: torch.Generator) -> None:
    pool, arena, ids, offsets = make(case, generator)
    gather_blocks(pool, arena, block_ids=ids, arena_offsets=offsets)
    assert [bytes(block.tolist()) for block in pool] == expected(case, arena)


@pytest.mark.parametrize("case", params())
def test_kernel_moves_the_same_bytes(
    case: Case,
    device: torch.device,
    generator: torch.Generator,
    register_arena: Callable[[Tensor], Tensor],
) -> None:
    pool, arena, ids, offsets = make(case, generator)
    moved = pool.to(device, copy=True)
    run = gather_blocks if device.type == "cuda" else kernel.gather_blocks
    run(moved, register_arena(arena), block_ids=ids.to(device), arena_offsets=offsets.to(device))
    reference.gather_blocks(pool, arena, block_ids=ids, arena_offsets=offsets)
    assert torch.equal(moved.cpu(), pool)


def test_kernel_stays_inside_both_buffers(device: torch.device) -> None:
    pool = torch.full((2, 64), 0xFF, dtype=torch.uint8, device=device)
    arena = torch.zeros(128, dtype=torch.uint8, device=device)
    ids = torch.tensor([2, 2**40, 0, 1, 0], device=device)
    offsets = torch.tensor([0, 0, 72, -8, -1], device=device)
    kernel.gather_blocks(pool, arena, block_ids=ids, arena_offsets=offsets)
    assert (pool == 0xFF).all()


@pytest.mark.gpu
@pytest.mark.parametrize("own_stream", [True, False], ids=["own-stream", "default-stream"])
@pytest.mark.parametrize("case", params())
def test_copy_engines_move_the_same_bytes(
    case: Case,
    own_stream: bool,
    device: torch.device,
    generator: torch.Generator,
    register_arena: Callable[[Tensor], Tensor],
) -> None:
    pool, arena, ids, offsets = make(case, generator)
    moved = pool.to(device, copy=True)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream() if own_stream else torch.cuda.default_stream()):
        gather_blocks(moved, register_arena(arena), block_ids=ids, arena_offsets=offsets)
    torch.cuda.synchronize()
    reference.gather_blocks(pool, arena, block_ids=ids, arena_offsets=offsets)
    assert torch.equal(moved.cpu(), pool)


@pytest.mark.gpu
def test_copy_engines_refuse_what_leaves_a_buffer(device: torch.device) -> None:
    pool = torch.full((2, 64), 0xFF, dtype=torch.uint8, device=device)
    arena = torch.zeros(128, dtype=torch.uint8)
    for block_id, offset in ((2, 0), (0, 72), (1, -8)):
        with pytest.raises(IndexError):
            gather_blocks(
                pool, arena, block_ids=torch.tensor([0, block_id]), arena_offsets=torch.tensor([0, offset])
            )
    assert (pool == 0xFF).all()
