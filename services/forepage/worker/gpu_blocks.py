"""Who holds which place of the device's KV memory: the allocators of its pools, with their promises.

Rank 0's worker alone keeps these accounts; the memory itself is in `kv_memory.py`, once a rank. Rows and keys
are separate pools of blocks; c128 rows, the sliding window and the compressor state are per sequence and
never paged.
"""

from dataclasses import dataclass

from forepage.errors import IntegrityError
from forepage.kv.block_allocator import BlockAllocator
from forepage.kv.geometry import BLOCK_ENTRIES, KvGeometry
from forepage.settings import WorkerSettings


@dataclass(frozen=True)
class PoolSizes:
    """How many of each the device holds; `staging_blocks` row blocks take a sequence's pulled rows."""

    row_blocks: int
    key_blocks: int
    key_reserve: int
    c128_blocks: int
    slots: int
    table_blocks: int
    staging_blocks: int

    @classmethod
    def from_settings(cls, settings: WorkerSettings, geometry: KvGeometry, *, topk: int) -> "PoolSizes":
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
            staging_blocks=-(-topk // BLOCK_ENTRIES),
        )


class GpuBlocks:
    """Owner of the allocators; sequences hold ids that were allocated here."""

    def __init__(self, sizes: PoolSizes) -> None:
        self.staging_blocks = sizes.staging_blocks
        self.rows = BlockAllocator("row blocks", sizes.row_blocks)
        self.keys = BlockAllocator("key blocks", sizes.key_blocks, sizes.key_reserve)
        self.c128 = BlockAllocator("c128 blocks", sizes.c128_blocks)
        self.slots = BlockAllocator("sequence slots", sizes.slots)

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
