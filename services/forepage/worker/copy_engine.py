"""Moves block records between the arena and the device, beside the computation.

On a GPU loads and stores are made by its copy engines, on streams of their own (copy_lane.py), ordered by
events: a copy starts after everything that was launched before it was asked for, and its future is done only
when its own event has fired. On a machine without a GPU one thread copies host memory.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from forepage.coldpool.records import payload_checksum
from forepage.kv.geometry import KvGeometry
from forepage.model.kv_pools import KvPools
from forepage.worker.commands import SKIP, BlockLoad
from forepage.worker.copy_lane import CopyLane
from forepage_kernels.gather_blocks import gather_blocks

T = TypeVar("T")


@dataclass(frozen=True)
class BlockStore:
    """Row, key and c128 blocks of the device -> arena record at `arena_offset`."""

    row_id: int
    key_id: int
    c128_id: int
    arena_offset: int


class CopyEngine:
    """Loads and stores of one device; its futures carry errors."""

    def __init__(self, pools: KvPools, arena: Tensor, geometry: KvGeometry) -> None:
        """`arena` is the mapped payload area, u8, registered with the GPU if there is one."""
        self._pools = pools
        self._arena = arena
        self._geometry = geometry
        self._device = pools.rows.device
        is_cuda = self._device.type == "cuda"
        self._load_lane = CopyLane("load", self._device) if is_cuda else None
        self._store_lane = CopyLane("store", self._device) if is_cuda else None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="copy")

    def load(self, loads: Seq[BlockLoad]) -> Future[None]:
        """Start loading; done when the bytes are on the device."""
        copy = partial(self._load, list(loads))
        if self._load_lane is None:
            return self._executor.submit(_on_host, copy, lambda: None)
        return self._load_lane.start(copy, lambda: None)

    def store(self, stores: Seq[BlockStore]) -> Future[list[int]]:
        """Start writing back; done when the bytes are in the arena, with each record's xxh3_64."""
        copy, sums = partial(self._store, list(stores)), partial(self._sums, list(stores))
        if self._store_lane is None:
            return self._executor.submit(_on_host, copy, sums)
        return self._store_lane.start(copy, sums)

    def put(self, arena_offset: int, payload: Tensor) -> Future[int]:
        """Write one payload (u8, host) into the arena; done with its xxh3_64."""
        return self._executor.submit(self._put, arena_offset, payload)

    def close(self) -> None:
        """Wait for what was started, then stop the threads."""
        for lane in (self._load_lane, self._store_lane):
            if lane is not None:
                lane.close()
        self._executor.shutdown(wait=True)

    def _load(self, loads: list[BlockLoad]) -> None:
        geometry = self._geometry
        offsets = np.array([load.arena_offset for load in loads], np.int64)
        parts = (
            (self._pools.rows, [load.row_id for load in loads], 0),
            (self._pools.keys, [load.key_id for load in loads], geometry.keys_offset),
            (self._pools.c128, [load.c128_id for load in loads], geometry.c128_offset),
        )
        for pool, ids, offset in parts:
            if pool.shape[1] and any(block_id != SKIP for block_id in ids):
                gather_blocks(
                    pool,
                    self._arena,
                    block_ids=torch.from_numpy(np.array(ids, np.int64)),
                    arena_offsets=torch.from_numpy(offsets + offset),
                )

    def _store(self, stores: list[BlockStore]) -> None:
        geometry = self._geometry
        for store in stores:
            record = self._arena[store.arena_offset : store.arena_offset + geometry.record_bytes]
            for pool, block_id, start in (
                (self._pools.rows, store.row_id, 0),
                (self._pools.keys, store.key_id, geometry.keys_offset),
                (self._pools.c128, store.c128_id, geometry.c128_offset),
            ):
                record[start : start + pool.shape[1]].copy_(pool[block_id], non_blocking=True)

    def _sums(self, stores: list[BlockStore]) -> list[int]:
        return [self._sum(store.arena_offset, self._geometry.record_bytes) for store in stores]

    def _put(self, arena_offset: int, payload: Tensor) -> int:
        self._arena[arena_offset : arena_offset + payload.numel()].copy_(payload)
        return self._sum(arena_offset, payload.numel())

    def _sum(self, arena_offset: int, num_bytes: int) -> int:
        return payload_checksum(self._arena[arena_offset : arena_offset + num_bytes].numpy().data)


def _on_host(copy: Callable[[], None], finish: Callable[[], T]) -> T:
    with torch.inference_mode():
        copy()
    return finish()
