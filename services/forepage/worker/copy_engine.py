"""Moves block records between the arena and the device, beside the computation.

One thread issues the copies. On a GPU they run on a stream of their own, ordered by events: a copy
starts after everything that was launched before it was asked for, and its future is done only when
its own event has fired. On a machine without a GPU the same thread copies host memory.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forepage.coldpool.records import payload_checksum
from forepage.kv.geometry import KvGeometry
from forepage.model.kv_pools import KvPools
from forepage.worker.commands import SKIP, BlockLoad
from forepage_kernels.gather_blocks import gather_blocks


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
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="copy")

    def load(self, loads: Seq[BlockLoad]) -> Future[None]:
        """Start loading; done when the bytes are on the device."""
        return self._executor.submit(self._ordered, self._load, list(loads), self._mark())

    def store(self, stores: Seq[BlockStore]) -> Future[list[int]]:
        """Start writing back; done when the bytes are in the arena, with each record's xxh3_64."""
        return self._executor.submit(self._store_and_sum, list(stores), self._mark())

    def put(self, arena_offset: int, payload: Tensor) -> Future[int]:
        """Write one payload (u8, host) into the arena; done with its xxh3_64."""
        return self._executor.submit(self._put, arena_offset, payload)

    def close(self) -> None:
        """Wait for what was started, then stop the thread."""
        self._executor.shutdown(wait=True)

    def _mark(self) -> torch.cuda.Event | None:
        """An event behind everything the caller's stream has launched so far."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _ordered(
        self, copy: Callable[[list[Any]], None], items: list[Any], after: torch.cuda.Event | None
    ) -> None:
        with torch.inference_mode():
            if self._stream is None:
                copy(items)
                return
            with torch.cuda.stream(self._stream):
                if after is not None:
                    self._stream.wait_event(after)
                copy(items)
                done = torch.cuda.Event()
                done.record(self._stream)
            done.synchronize()

    def _load(self, loads: list[BlockLoad]) -> None:
        geometry = self._geometry
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
                    block_ids=torch.tensor(ids, dtype=torch.int64, device=self._device),
                    arena_offsets=torch.tensor(
                        [load.arena_offset + offset for load in loads], dtype=torch.int64, device=self._device
                    ),
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

    def _store_and_sum(self, stores: list[BlockStore], after: torch.cuda.Event | None) -> list[int]:
        self._ordered(self._store, stores, after)
        return [self._sum(store.arena_offset, self._geometry.record_bytes) for store in stores]

    def _put(self, arena_offset: int, payload: Tensor) -> int:
        self._arena[arena_offset : arena_offset + payload.numel()].copy_(payload)
        return self._sum(arena_offset, payload.numel())

    def _sum(self, arena_offset: int, num_bytes: int) -> int:
        return payload_checksum(self._arena[arena_offset : arena_offset + num_bytes].numpy().data)
