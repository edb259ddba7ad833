"""Cases that move KV from the arena: whole blocks, and single rows for `exact`."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import flash
from bench.case import Case, Ceiling, Timing, WrongResultError
from forepage_kernels.gather_blocks import gather_blocks
from forepage_kernels.gather_rows import gather_rows
from forepage_kernels.layout import RowPool

BLOCK_COUNTS = (1, 16, 64, 400)
ROW_COUNTS = (512, 512 * flash.C4_LAYERS)
VARIANTS = 4
POISON = 0xFF


@dataclass(frozen=True)
class BlockLoads:
    """Records scattered over the arena to blocks scattered over a pool; only the rows of each record,
    which are the bulk of it: keys and c128 rows go the same way.
    """

    pool: Tensor  # u8 [2 * count, ROWS_BLOCK_BYTES]
    arena: Tensor
    block_ids: list[Tensor]  # i64 [count] each, on the device for the kernel, on the host for copy engines
    offsets: list[Tensor]

    @classmethod
    def draw(cls, count: int, arena: Tensor, device: torch.device, *, by_engine: bool) -> "BlockLoads":
        """`count` loads, drawn anew for every variant."""
        slots = arena.numel() // flash.SLOT_BYTES
        ids_on = torch.device("cpu") if by_engine else device
        return cls(
            pool=torch.empty(2 * count, flash.ROWS_BLOCK_BYTES, dtype=torch.uint8, device=device),
            arena=arena,
            block_ids=[torch.randperm(2 * count)[:count].to(ids_on) for _ in range(VARIANTS)],
            offsets=[(torch.randperm(slots)[:count] * flash.SLOT_BYTES).to(ids_on) for _ in range(VARIANTS)],
        )

    def load(self, variant: int) -> None:
        """What is measured."""
        ids, offsets = self.block_ids[variant], self.offsets[variant]
        gather_blocks(self.pool, self.arena, block_ids=ids, arena_offsets=offsets)

    def copy_one_by_one(self) -> None:
        """The same by one asynchronous copy a block."""
        for block, start in self._pairs():
            self.pool[block].copy_(self._record(start), non_blocking=True)

    def check(self) -> float:
        """Every byte that was asked for, and no other."""
        self.pool.fill_(POISON)
        self.load(0)
        for block, start in self._pairs():
            if not torch.equal(self.pool[block].cpu(), self._record(start)):
                raise WrongResultError(f"gather_blocks: block {block} differs from its record")
        untouched = torch.ones(len(self.pool), dtype=torch.bool, device=self.pool.device)
        untouched[self.block_ids[0].to(untouched.device)] = False
        if not bool((self.pool[untouched] == POISON).all()):
            raise WrongResultError("gather_blocks: wrote a block that nobody asked for")
        return 0.0

    def _pairs(self) -> list[tuple[int, int]]:
        return list(zip(self.block_ids[0].tolist(), self.offsets[0].tolist(), strict=True))

    def _record(self, start: int) -> Tensor:
        return self.arena[start : start + flash.ROWS_BLOCK_BYTES]


@dataclass(frozen=True)
class RowPulls:
    """Single rows from anywhere in the arena to the staging slots of one layer, as `exact` pulls them."""

    pool: RowPool
    arena: Tensor
    slots: Tensor  # i64 [count]
    planes: list[Tensor]  # i64 [count] each
    entries: list[Tensor]

    @classmethod
    def draw(cls, count: int, arena: Tensor, device: torch.device) -> "RowPulls":
        """`count` rows, each from a record, layer and entry of its own."""
        blocks = -(-count // flash.BLOCK_ENTRIES)
        staging = torch.empty(blocks, flash.ROWS_PLANE_BYTES, dtype=torch.uint8, device=device)
        records = arena.numel() // flash.SLOT_BYTES

        def planes() -> Tensor:
            record = torch.randint(records, (count,)) * flash.SLOT_BYTES
            return (record + torch.randint(flash.C4_LAYERS, (count,)) * flash.ROWS_PLANE_BYTES).to(device)

        return cls(
            pool=RowPool(staging, 0, flash.ROWS),
            arena=arena,
            slots=torch.arange(count, device=device),
            planes=[planes() for _ in range(VARIANTS)],
            entries=[torch.randint(flash.BLOCK_ENTRIES, (count,), device=device) for _ in range(VARIANTS)],
        )

    def pull(self, variant: int) -> None:
        """What is measured."""
        planes, entries = self.planes[variant], self.entries[variant]
        gather_rows(self.pool, self.arena, slots=self.slots, plane_offsets=planes, entries=entries)

    def check(self) -> float:
        """Values and scales of every row."""
        self.pool.bytes.fill_(POISON)
        self.pull(0)
        layout = flash.ROWS
        planes, entries = self.planes[0].cpu(), self.entries[0].cpu()
        values, scales = self.pool.values.cpu().flatten(0, 1), self.pool.scales.cpu().flatten(0, 1)
        for row, (plane, entry) in enumerate(zip(planes.tolist(), entries.tolist(), strict=True)):
            value = plane + entry * layout.value_bytes
            scale = plane + layout.entries * layout.value_bytes + entry * layout.scale_bytes
            same = torch.equal(values[row], self.arena[value : value + layout.value_bytes])
            if not (same and torch.equal(scales[row], self.arena[scale : scale + layout.scale_bytes])):
                raise WrongResultError(f"gather_rows: row {row} differs from the arena's")
        return 0.0


def transfer_cases(arena: Tensor, device: torch.device) -> Iterator[Case]:
    """Block loads by the kernel and by the copy engines, and row pulls, of several sizes."""
    for by_engine in (False, True):
        for count in BLOCK_COUNTS:
            yield _load_case(BlockLoads.draw(count, arena, device, by_engine=by_engine), count, Timing.STREAM)
        yield _load_case(BlockLoads.draw(1, arena, device, by_engine=by_engine), 1, Timing.WALL)
    for count in ROW_COUNTS:
        pulls = RowPulls.draw(count, arena, device)
        yield Case(
            kernel="gather_rows",
            shape=f"{count} rows x {flash.ROW_BYTES} B, scattered",
            dtype="u8",
            num_bytes=count * flash.ROW_BYTES,
            flops=0,
            ceilings=[Ceiling.HOST_TO_DEVICE],
            calls=[lambda variant=v, pulls=pulls: pulls.pull(variant) for v in range(VARIANTS)],  # type: ignore[misc]
            check=pulls.check,
        )


def _load_case(loads: BlockLoads, count: int, timing: Timing) -> Case:
    by = "kernel" if loads.block_ids[0].is_cuda else "copy engines"
    waited = ", call to done" if timing is Timing.WALL else ""
    return Case(
        kernel="gather_blocks",
        shape=f"{count} blocks x {flash.ROWS_BLOCK_BYTES} B, {by}{waited}",
        dtype="u8",
        num_bytes=count * flash.ROWS_BLOCK_BYTES,
        flops=0,
        ceilings=[Ceiling.HOST_TO_DEVICE],
        calls=[lambda variant=v: loads.load(variant) for v in range(VARIANTS)],  # type: ignore[misc]
        check=loads.check,
        other_call=loads.copy_one_by_one,
        other="one asynchronous copy a block",
        timing=timing,
    )
