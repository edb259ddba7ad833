"""The device's KV memory: pools, their allocators, and the block tables that attention reads.

One owner for all of it. Rows and keys are separate pools of blocks; c128 rows, the sliding window and
the compressor state are per sequence and never paged. On a machine without a GPU the same tensors
lie in host memory.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from forepage.errors import IntegrityError
from forepage.kv.block_allocator import BlockAllocator
from forepage.kv.geometry import BLOCK_ENTRIES, KvGeometry
from forepage.kv.resident_set import NOT_RESIDENT, ResidentSet
from forepage.model.kv_pools import DecodeBatch, KvPools, PoolCapacity, PrefillChunk
from forepage.settings import WorkerSettings

NO_ARENA = -1


@dataclass(frozen=True)
class PoolSizes:
    """How many of each the device holds."""

    row_blocks: int
    key_blocks: int
    key_reserve: int
    c128_blocks: int
    slots: int
    table_blocks: int

    @classmethod
    def from_settings(cls, settings: WorkerSettings, geometry: KvGeometry) -> "PoolSizes":
        """Divide `kv_bytes`; the escalation reserve is part of the key share."""
        c128_bytes = settings.kv_bytes * settings.c128_share
        key_bytes = settings.kv_bytes * settings.key_share
        row_bytes = settings.kv_bytes - c128_bytes - key_bytes
        key_blocks = int(key_bytes // geometry.keys_bytes)
        return cls(
            row_blocks=max(2, int(row_bytes // geometry.rows_bytes)),
            key_blocks=max(2, key_blocks),
            key_reserve=min(settings.escalation_reserve_bytes // geometry.keys_bytes, key_blocks // 2),
            c128_blocks=max(2, int(c128_bytes // max(geometry.c128_bytes, 1))),
            slots=settings.max_running,
            table_blocks=geometry.num_blocks(settings.max_context_tokens),
        )


class GpuBlocks:
    """Owner of the pools; sequences hold ids that were allocated here."""

    def __init__(self, geometry: KvGeometry, sizes: PoolSizes, *, topk: int, device: torch.device) -> None:
        """`topk` sizes the staging of pulled rows: ceil(topk / 64) row blocks a sequence."""
        self.geometry = geometry
        self.sizes = sizes
        self.device = device
        self.staging_blocks = -(-topk // BLOCK_ENTRIES)
        self.rows = BlockAllocator("row blocks", sizes.row_blocks)
        self.keys = BlockAllocator("key blocks", sizes.key_blocks, sizes.key_reserve)
        self.c128 = BlockAllocator("c128 blocks", sizes.c128_blocks)
        self.slots = BlockAllocator("sequence slots", sizes.slots)
        capacity = PoolCapacity(sizes.slots, sizes.row_blocks, sizes.key_blocks, sizes.c128_blocks)
        self.pools = KvPools.allocate(geometry, capacity, device)
        table = (sizes.slots, sizes.table_blocks)
        self._row_table = torch.full(table, NOT_RESIDENT, dtype=torch.int32, device=device)
        self._key_table = torch.full(table, NOT_RESIDENT, dtype=torch.int32, device=device)
        self._c128_table = torch.full(table, NOT_RESIDENT, dtype=torch.int32, device=device)
        self._arena_offsets = torch.full(table, NO_ARENA, dtype=torch.int64, device=device)
        self._staging = torch.full(
            (sizes.slots, self.staging_blocks), NOT_RESIDENT, dtype=torch.int64, device=device
        )

    def set_residency(self, slot: int, resident: ResidentSet) -> None:
        """Make attention see this set from the next step on: the commit."""
        self._set(self._row_table, slot, resident.row_table())
        self._set(self._key_table, slot, resident.key_table())

    def set_c128(self, slot: int, ids: Seq[int]) -> None:
        """The c128 blocks of a sequence, in block order."""
        self._set(self._c128_table, slot, ids)

    def set_arena_offsets(self, slot: int, offsets: Seq[int]) -> None:
        """Where each block's record payload begins in the arena, NO_ARENA where it isn't there yet."""
        self._set(self._arena_offsets, slot, offsets)

    def set_staging(self, slot: int, row_ids: Seq[int]) -> None:
        """Row blocks that pulled rows of this sequence go to; none: it never pulls."""
        self._staging[slot] = NOT_RESIDENT
        if row_ids:
            self._staging[slot] = torch.tensor(row_ids, dtype=torch.int64, device=self.device)

    def clear_slot(self, slot: int) -> None:
        """Forget a sequence's tables and state; the next one in this slot starts from nothing."""
        for table in (self._row_table, self._key_table, self._c128_table, self._staging):
            table[slot] = NOT_RESIDENT
        self._arena_offsets[slot] = NO_ARENA
        pools = self.pools
        for state in (pools.window, pools.c4_state, pools.key_state, pools.c128_state):
            state[slot].zero_()

    def decode_batch(self, slots: Seq[int], positions: Seq[int]) -> DecodeBatch:
        """Tables of these sequences, cut to the longest; positions are those of the tokens to process."""
        blocks = self.geometry.num_blocks(max(positions) + 1)
        index = torch.tensor(slots, dtype=torch.int64, device=self.device)
        return DecodeBatch(
            slots=index,
            positions=torch.tensor(positions, dtype=torch.int64, device=self.device),
            row_table=self._row_table[index, :blocks],
            key_table=self._key_table[index, :blocks],
            c128_table=self._c128_table[index, :blocks],
            staging=self._staging[index],
            arena_offsets=self._arena_offsets[index, :blocks],
        )

    def prefill_chunk(self, slot: int, start: int, num_tokens: int) -> PrefillChunk:
        """Tables of one sequence for a prefill chunk; every block of it must be resident."""
        blocks = self.geometry.num_blocks(start + num_tokens)
        return PrefillChunk(
            slot=slot,
            start=start,
            row_table=self._row_table[slot, :blocks],
            key_table=self._key_table[slot, :blocks],
            c128_table=self._c128_table[slot, :blocks],
        )

    def check_integrity(self) -> None:
        """Raises: IntegrityError when an allocator's law is broken."""
        for allocator in (self.rows, self.keys, self.c128, self.slots):
            allocator.check_integrity()

    def check_idle(self) -> None:
        """Raises: IntegrityError when no sequence lives and something is still held or promised."""
        for allocator in (self.rows, self.keys, self.c128, self.slots):
            if allocator.num_held or allocator.promised:
                raise IntegrityError(
                    f"{allocator.name}: idle with {allocator.num_held} held, {allocator.promised} promised"
                )

    def _set(self, table: Tensor, slot: int, values: Seq[int]) -> None:
        table[slot, : len(values)] = torch.tensor(values, dtype=table.dtype, device=self.device)
