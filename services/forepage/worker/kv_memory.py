"""One rank's KV memory: the pools, and the tables through which attention finds what is in them.

Every rank has all of it, of the same content: there is one key-value head. On a machine without a GPU the
same tensors lie in host memory.
"""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from forepage.kv.geometry import KvGeometry
from forepage.kv.resident_set import NOT_RESIDENT
from forepage.model.kv_pools import DecodeBatch, KvPools, PoolCapacity, PrefillChunk
from forepage.worker.commands import Table
from forepage.worker.gpu_blocks import PoolSizes

NO_ARENA = -1


class KvMemory:
    """Owner of pools and tables."""

    def __init__(self, geometry: KvGeometry, sizes: PoolSizes, device: torch.device) -> None:
        self.geometry = geometry
        self.device = device
        capacity = PoolCapacity(sizes.slots, sizes.row_blocks, sizes.key_blocks, sizes.c128_blocks)
        self.pools = KvPools.allocate(geometry, capacity, device)
        shape = (sizes.slots, sizes.table_blocks)
        blocks = {name: _table(shape, torch.int32, device) for name in (Table.ROWS, Table.KEYS, Table.C128)}
        self.tables = blocks | {
            Table.ARENA: _table(shape, torch.int64, device),
            Table.STAGING: _table((sizes.slots, sizes.staging_blocks), torch.int64, device),
        }
        """By slot: block_idx -> block id of each pool, -> byte offset of its record in the arena; and the row
        blocks that pulled rows go to. NOT_RESIDENT and NO_ARENA are both -1."""

    def set_table(self, table: Table, slot: int, values: Seq[int]) -> None:
        """Write the beginning of a sequence's row of a table; what lies behind it stays."""
        rows = self.tables[table]
        rows[slot, : len(values)] = torch.tensor(values, dtype=rows.dtype, device=self.device)

    def clear_slot(self, slot: int) -> None:
        """Forget a sequence's tables and state; the next one in this slot starts from nothing."""
        for table in self.tables.values():
            table[slot] = NOT_RESIDENT
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
            row_table=self.tables[Table.ROWS][index, :blocks],
            key_table=self.tables[Table.KEYS][index, :blocks],
            c128_table=self.tables[Table.C128][index, :blocks],
            staging=self.tables[Table.STAGING][index],
            arena_offsets=self.tables[Table.ARENA][index, :blocks],
        )

    def prefill_chunk(self, slot: int, start: int, num_tokens: int) -> PrefillChunk:
        """Tables of one sequence for a prefill chunk; every block of it must be resident."""
        blocks = self.geometry.num_blocks(start + num_tokens)
        return PrefillChunk(
            slot=slot,
            start=start,
            row_table=self.tables[Table.ROWS][slot, :blocks],
            key_table=self.tables[Table.KEYS][slot, :blocks],
            c128_table=self.tables[Table.C128][slot, :blocks],
        )


def _table(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, NOT_RESIDENT, dtype=dtype, device=device)
