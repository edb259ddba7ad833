"""Which blocks of one sequence are on the device, and why: the single truth behind its block tables.

Rows and keys are counted apart, since `exact` keeps every key. Blocks from `pinned_from` on are always
resident (the tail, what is being built, what is not in the arena yet); resident ones before it were
chosen by score. Only `commit` changes what attention will see.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from forepage.errors import IntegrityError

NOT_RESIDENT = -1


@dataclass(frozen=True)
class Freed:
    """Pool ids that a commit gave up; the caller returns them to the allocators."""

    row_ids: tuple[int, ...]
    key_ids: tuple[int, ...]


@dataclass
class ResidentSet:
    """block_idx -> row block id and key block id of one sequence."""

    row_id_by_block: dict[int, int] = field(default_factory=dict)
    key_id_by_block: dict[int, int] = field(default_factory=dict)
    pinned_from: int = 0
    num_blocks: int = 0
    version: int = field(default=0, compare=False)
    """Grows with every change: what was derived from the set holds while it stays."""

    @property
    def chosen(self) -> list[int]:
        """Blocks whose rows are resident because of their score, ascending."""
        return sorted(idx for idx in self.row_id_by_block if idx < self.pinned_from)

    @property
    def num_pinned(self) -> int:
        """Blocks that are always resident."""
        return self.num_blocks - self.pinned_from

    @property
    def num_resident(self) -> int:
        """Blocks whose rows are resident."""
        return len(self.row_id_by_block)

    @property
    def rows_complete(self) -> bool:
        """Whether no row is absent."""
        return len(self.row_id_by_block) == self.num_blocks

    @property
    def keys_complete(self) -> bool:
        """Whether no key is absent."""
        return len(self.key_id_by_block) == self.num_blocks

    def append(self, row_id: int, key_id: int) -> int:
        """A new block under construction; answers its block_idx."""
        self.version += 1
        block_idx = self.num_blocks
        self.row_id_by_block[block_idx] = row_id
        self.key_id_by_block[block_idx] = key_id
        self.num_blocks += 1
        return block_idx

    def commit(
        self,
        *,
        pinned_from: int,
        loaded_rows: Mapping[int, int],
        loaded_keys: Mapping[int, int],
        drop_rows: Iterable[int],
        drop_keys: Iterable[int],
    ) -> Freed:
        """Swap in what was loaded and out what is dropped. Raises: IntegrityError against the laws."""
        row_drops, key_drops = list(drop_rows), list(drop_keys)
        if any(idx >= pinned_from for idx in (*row_drops, *key_drops)):
            raise IntegrityError(f"drop of an always-resident block (pinned from {pinned_from})")
        if set(loaded_rows) & set(self.row_id_by_block) or set(loaded_keys) & set(self.key_id_by_block):
            raise IntegrityError("load of a block that is resident")
        self.version += 1
        self.pinned_from = pinned_from
        self.row_id_by_block.update(loaded_rows)
        self.key_id_by_block.update(loaded_keys)
        rows = tuple(self.row_id_by_block.pop(idx) for idx in row_drops)
        keys = tuple(self.key_id_by_block.pop(idx) for idx in key_drops)
        return Freed(rows, keys)

    def clear(self) -> Freed:
        """The sequence ended: everything is given up."""
        self.version += 1
        freed = Freed(tuple(self.row_id_by_block.values()), tuple(self.key_id_by_block.values()))
        self.row_id_by_block.clear()
        self.key_id_by_block.clear()
        self.num_blocks = self.pinned_from = 0
        return freed

    def row_table(self) -> list[int]:
        """Row block id of every block, NOT_RESIDENT where absent."""
        return [self.row_id_by_block.get(idx, NOT_RESIDENT) for idx in range(self.num_blocks)]

    def key_table(self) -> list[int]:
        """Key block id of every block, NOT_RESIDENT where absent."""
        return [self.key_id_by_block.get(idx, NOT_RESIDENT) for idx in range(self.num_blocks)]

    def check_integrity(self) -> None:
        """Raises: IntegrityError when a pinned block is absent, an id is used twice, or an idx is unknown."""
        pinned = range(self.pinned_from, self.num_blocks)
        for name, ids in (("row", self.row_id_by_block), ("key", self.key_id_by_block)):
            if any(idx not in ids for idx in pinned):
                raise IntegrityError(f"an always-resident {name} block is absent")
            if len(set(ids.values())) != len(ids):
                raise IntegrityError(f"a {name} block id stands for two blocks")
            if any(not 0 <= idx < self.num_blocks for idx in ids):
                raise IntegrityError(f"a {name} block beyond the sequence")
