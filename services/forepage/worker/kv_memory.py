"""One rank's KV memory: the pools, and the tables through which attention finds what is in them.

Every rank has all of it, of the same content: there is one key-value head. On a machine without a GPU the
same tensors lie in host memory.

On a GPU a table has two copies. Changes are written to the host's; `flush` launches, between two steps and on
their stream, one scatter that brings all that changed to the device's. A decode step reads a copy of its
sequences' rows that it gathers at its start. So no table changes under a running kernel, and nobody waits.
"""

from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from forepage.kv.geometry import KvGeometry
from forepage.kv.resident_set import NOT_RESIDENT
from forepage.model.kv_pools import DecodeBatch, KvPools, PoolCapacity, PrefillChunk
from forepage.worker.commands import Table
from forepage.worker.gpu_blocks import PoolSizes
from forepage.worker.host_copy import upload

NO_ARENA = -1
Places = npt.NDArray[np.int64]


class KvMemory:
    """Owner of pools and tables."""

    def __init__(self, geometry: KvGeometry, sizes: PoolSizes, device: torch.device) -> None:
        self.geometry = geometry
        self.device = device
        self.padding_slot = sizes.slots
        """One slot beyond the sequences': for rows that only fill up a batch (DecodeBatch)."""
        num_slots = sizes.slots + 1
        capacity = PoolCapacity(num_slots, sizes.row_blocks, sizes.key_blocks, sizes.c128_blocks)
        self.pools = KvPools.allocate(geometry, capacity, device)
        shape = (num_slots, sizes.table_blocks)
        self._host = {name: _table(shape, torch.int32) for name in (Table.ROWS, Table.KEYS, Table.C128)}
        self._host |= {
            Table.ARENA: _table(shape, torch.int64),
            Table.STAGING: _table((num_slots, sizes.staging_blocks), torch.int64),
        }
        self.tables = {name: table.to(device) for name, table in self._host.items()}
        """By slot: block_idx -> block id of each pool, -> byte offset of its record in the arena; and the row
        blocks that pulled rows go to. NOT_RESIDENT and NO_ARENA are both -1."""
        self._unflushed: dict[Table, list[Places]] = defaultdict(list)
        self._is_mirrored = device.type != "cpu"
        for slot in range(num_slots):  # a padding row reads its slot as it is, and ranks compare theirs
            self._clear_state(slot)

    @property
    def table_blocks(self) -> int:
        """Blocks of the longest sequence."""
        return self.tables[Table.ROWS].shape[1]

    @property
    def num_slots(self) -> int:
        """Sequence slots, the padding slot included."""
        return self.padding_slot + 1

    def set_table(self, table: Table, slot: int, values: Seq[int]) -> None:
        """Write the beginning of a sequence's row of a table; what lies behind it stays."""
        self.edit_table(table, slot, range(len(values)), values)

    def edit_table(self, table: Table, slot: int, places: Iterable[int], values: Seq[int]) -> None:
        """Write single places of a sequence's row of a table; seen by the next step that is launched."""
        at = np.fromiter(places, np.int64)
        row = self._host[table][slot].numpy()
        row[at] = values
        self._touch(table, slot, at)

    def clear_slot(self, slot: int) -> None:
        """Forget a sequence's tables and state; the next one in this slot starts from nothing."""
        for name, table in self._host.items():
            table[slot] = NOT_RESIDENT
            self._touch(name, slot, np.arange(table.shape[1]))
        self._clear_state(slot)

    def flush(self) -> None:
        """Bring what was changed to the device; before each step. Never waits."""
        for name, touched in self._unflushed.items():
            places = np.unique(np.concatenate(touched))  # two writes of one place in a scatter would race
            values = self._host[name].numpy().reshape(-1)[places]
            flat = self.tables[name].view(-1)
            flat.index_copy_(0, upload(places, self.device), upload(values, self.device))
        self._unflushed.clear()

    def decode_batch(self, slots: Seq[int], positions: Seq[int]) -> DecodeBatch:
        """Tables of these sequences, cut to the longest; positions are those of the tokens to process."""
        return self.gather(
            torch.tensor(slots, dtype=torch.int64, device=self.device),
            torch.tensor(positions, dtype=torch.int64, device=self.device),
            num_blocks=self.geometry.num_blocks(max(positions) + 1),
        )

    def gather(self, slots: Tensor, positions: Tensor, *, num_blocks: int) -> DecodeBatch:
        """Copies of the first `num_blocks` of the slots' tables; slots and positions i64 [B]."""

        def rows(name: Table) -> Tensor:
            return self.tables[name][:, :num_blocks].index_select(0, slots)

        return DecodeBatch(
            slots=slots,
            positions=positions,
            row_table=rows(Table.ROWS),
            key_table=rows(Table.KEYS),
            c128_table=rows(Table.C128),
            staging=self.tables[Table.STAGING].index_select(0, slots),
            arena_offsets=rows(Table.ARENA),
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

    def _touch(self, table: Table, slot: int, places: Places) -> None:
        if self._is_mirrored:
            self._unflushed[table].append(slot * self._host[table].shape[1] + places)

    def _clear_state(self, slot: int) -> None:
        pools = self.pools
        for state in (pools.window, pools.c4_state, pools.key_state, pools.c128_state):
            state[slot].zero_()


def _table(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, NOT_RESIDENT, dtype=dtype)
