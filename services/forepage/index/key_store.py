"""The indexer keys of every sequence of this host, as they lie in the arena: mapped, never copied or written.

The manager may evict or rewrite a slot that nobody leases, and a worker's lease may end while we score. So
a block is *readable* only if its header says `complete` at the asked generation both before and after its
keys were used; callers ask `MappedKeys.readable` twice. A new arena (another file under the name) is mapped
when it appears; work under way goes on with the old mapping, which lives until its last user is gone. For a
GPU a mapping is handed out once all of it is page-locked; meanwhile nothing is, since in the old one the same
slot and generation may stand for another record.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from forepage.coldpool.arena import ArenaView
from forepage.coldpool.records import SlotRef
from forepage.errors import DependencyError
from forepage.index.page_lock import PageLock
from forepage.kv.geometry import KvGeometry
from forepage.model.kv_pools import key_layout
from forepage_kernels.layout import KeyPool

ABSENT_PLANE = -1
"""Stands for the plane of a block that can't be read."""


class MappedKeys:
    """One arena's payloads as tensors, readable by `device`; safe to use from several threads."""

    def __init__(self, view: ArenaView, geometry: KvGeometry, device: torch.device) -> None:
        """Raises: DependencyError when the arena's slots are not of this model's size."""
        if view.slot_bytes != geometry.slot_bytes:
            raise DependencyError(
                f"the arena's slots have {view.slot_bytes} bytes, this model's records need "
                f"{geometry.slot_bytes}: do the cold pool and the index read the same FOREPAGE_MODEL__*?"
            )
        self._view = view
        self._geometry = geometry
        self.payloads = _as_tensor(view.buffer)
        """u8 [num_slots * slot_bytes], in host memory"""
        self.page_lock = PageLock(self, self.payloads, device) if device.type == "cuda" else None

    @property
    def uuid(self) -> str:
        """Names the arena."""
        return self._view.uuid

    def readable(self, blocks: Sequence[SlotRef]) -> Tensor:
        """Which of these are complete at their generation right now: bool [len(blocks)]."""
        return torch.tensor([self._view.matches(ref) for ref in blocks], dtype=torch.bool)

    def plane_offsets(self, blocks: Sequence[SlotRef], readable: Tensor, layers: Sequence[int]) -> Tensor:
        """Byte offsets in `payloads` of each block's key planes, ABSENT_PLANE where it isn't readable.

        Shapes: readable bool [n], layers: c4 indices -> i64 [n, len(layers)].
        """
        slots = _arena_ids(blocks)  # i64 [n]
        planes = torch.tensor([self._layer_offset(layer) for layer in layers], dtype=torch.int64)
        offsets = slots.unsqueeze(1) * self._geometry.slot_bytes + planes  # [n, L]
        return torch.where(readable.unsqueeze(1), offsets, ABSENT_PLANE)

    def block_table(self, blocks: Sequence[SlotRef], readable: Tensor) -> Tensor:
        """Arena slots as block ids of `pool`, -1 where a block isn't readable: i32 [n]."""
        return torch.where(readable, _arena_ids(blocks), ABSENT_PLANE).to(torch.int32)

    def pool(self, layer_idx: int) -> KeyPool:
        """One c4 layer's keys with the arena as the pool: block id = arena id."""
        blocks = self.payloads.view(-1, self._geometry.slot_bytes)  # [num_slots, slot_bytes]
        return KeyPool(blocks, self._layer_offset(layer_idx), key_layout(self._geometry))

    def _layer_offset(self, layer_idx: int) -> int:
        return self._geometry.keys_offset + layer_idx * self._geometry.keys_plane_bytes


class KeyStore:
    """Owns the current mapping; used from one thread, hands out `MappedKeys`."""

    def __init__(self, path: Path, geometry: KvGeometry, device: torch.device) -> None:
        self._path = path
        self._geometry = geometry
        self._device = device
        self._mapped: MappedKeys | None = None
        self._file: tuple[int, int] | None = None

    @property
    def is_mapped(self) -> bool:
        """Whether an arena was found yet."""
        return self._mapped is not None

    def current(self) -> MappedKeys:
        """The arena that lies under the path now; a file that is gone leaves the last mapping in use.

        Never waits. Raises: DependencyError while there was never one, it isn't this model's, or the GPU
        can't read all of it yet; IntegrityError if the file is no arena or of another layout version.
        """
        file = self._identity()
        if self._mapped is None or (file is not None and file != self._file):
            # The identity was taken before opening: a replacement in between is noticed next time.
            self._mapped = None
            self._mapped = MappedKeys(self._open(), self._geometry, self._device)
            self._file = file
        if self._mapped.page_lock is not None:
            self._mapped.page_lock.check()
        return self._mapped

    def close(self, timeout_s: float) -> bool:
        """Let go of the mapping. Whether nothing of it was page-locked any more within that time."""
        page_lock = None if self._mapped is None else self._mapped.page_lock
        self._mapped = None
        return page_lock is None or page_lock.wait_end(timeout_s)

    def _open(self) -> ArenaView:
        # CUDA page-locks only what the process could write; nothing here ever writes.
        writable = self._device.type == "cuda"
        try:
            return ArenaView.open(self._path, writable=writable)
        except OSError as error:
            raise DependencyError(f"arena {self._path}: can't be mapped: {error}") from error

    def _identity(self) -> tuple[int, int] | None:
        """Device and inode: never reused while we still map the old file."""
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_dev, found.st_ino


def _arena_ids(blocks: Sequence[SlotRef]) -> Tensor:
    return torch.tensor([ref.arena_id for ref in blocks], dtype=torch.int64)


def _as_tensor(buffer: memoryview) -> Tensor:
    """Wrap read-only bytes; torch warns because it can't forbid writes, and nothing here writes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
        return torch.frombuffer(buffer, dtype=torch.uint8)
