"""The tensors a model reads and writes for its sequences, and the tables that address them.

The worker owns the pools and decides which block lives where; the model writes rows, keys, windows and
compressor state into them. A sequence has a *slot* (window ring, compressor state) and, for each of its
blocks of 256 tokens, a row block, a key block and a c128 block. Rows and keys are separate pools because
`exact` keeps every key on the GPU but not every row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from forepage.kv.geometry import BLOCK_ENTRIES, C128_RATIO, STATE_WINDOW, KvFormat, KvGeometry
from forepage_kernels.layout import Format, KeyLayout, KeyPool, RowLayout, RowPool

NOT_RESIDENT = -1
"""A block id, slot or arena offset that stands for nothing."""

NAN_BYTE = 0xFF
"""Fills memory with NaN as e4m3, bf16 and fp32."""


@dataclass(frozen=True)
class PoolCapacity:
    """How many of each a set of pools holds."""

    slots: int
    row_blocks: int
    key_blocks: int
    c128_blocks: int


@dataclass(frozen=True)
class KvPools:
    """Byte pools (layouts in `kv/geometry.py`) and fp32 compressor state.

    Token t is at ring place t % window_tokens in `window`, t % 8 in `c4_state` and `key_state`,
    t % 128 in `c128_state`; the state's axis of 2 is (kv, gate), the gate with its position bias added.
    """

    rows: Tensor  # u8 [num_row_blocks, geometry.rows_bytes]
    keys: Tensor  # u8 [num_key_blocks, geometry.keys_bytes]
    c128: Tensor  # u8 [num_c128_blocks, geometry.c128_bytes]
    window: Tensor  # u8 [num_slots, geometry.window_bytes]
    c4_state: Tensor  # f32 [num_slots, n_c4, 2, 8, 2 * head_dim]
    key_state: Tensor  # f32 [num_slots, n_c4, 2, 8, 2 * index_dims]
    c128_state: Tensor  # f32 [num_slots, n_c128, 2, 128, head_dim]

    @classmethod
    def allocate(cls, geometry: KvGeometry, capacity: PoolCapacity, device: torch.device) -> "KvPools":
        """Pools of that capacity; their content is undefined."""

        def pool(count: int, num_bytes: int) -> Tensor:
            return torch.empty(count, num_bytes, dtype=torch.uint8, device=device)

        def state(layers: int, window: int, dims: int) -> Tensor:
            return torch.empty(capacity.slots, layers, 2, window, dims, device=device)

        num_c4, num_c128 = len(geometry.c4_layers), len(geometry.c128_layers)
        return cls(
            rows=pool(capacity.row_blocks, geometry.rows_bytes),
            keys=pool(capacity.key_blocks, geometry.keys_bytes),
            c128=pool(capacity.c128_blocks, geometry.c128_bytes),
            window=pool(capacity.slots, geometry.window_bytes),
            c4_state=state(num_c4, STATE_WINDOW, 2 * geometry.head_dim),
            key_state=state(num_c4, STATE_WINDOW, 2 * geometry.index_dims),
            c128_state=state(num_c128, C128_RATIO, geometry.head_dim),
        )

    @classmethod
    def poisoned(cls, geometry: KvGeometry, capacity: PoolCapacity, device: torch.device) -> "KvPools":
        """As `allocate`, but whatever is read before it was written is NaN: in every byte format."""
        pools = cls.allocate(geometry, capacity, device)
        for pool in (pools.rows, pools.keys, pools.c128, pools.window):
            pool.fill_(NAN_BYTE)
        for state in (pools.c4_state, pools.key_state, pools.c128_state):
            state.fill_(float("nan"))
        return pools


@dataclass(frozen=True)
class DecodeBatch:
    """One decode step of B sequences; every tensor is on the model's device.

    The block that holds token `positions[b]` must be resident in all three tables, and the tables must
    reach it (M > position // 256). An entry whose key block is absent can't be selected. A row that
    only fills up a fixed batch size has a slot of its own that no sequence uses, position 0 and tables of
    `NOT_RESIDENT`: nothing of it is stored in the pools but that slot's window and state.
    """

    slots: Tensor  # i64 [B] sequence slot
    positions: Tensor  # i64 [B] 0-based position of the token being processed
    row_table: Tensor  # i32 [B, M] block_idx -> row block id
    key_table: Tensor  # i32 [B, M]
    c128_table: Tensor  # i32 [B, M]
    staging: Tensor  # i64 [B, ceil(index_topk / 64)] row block ids that pulled rows go to
    arena_offsets: Tensor  # i64 [B, M] byte offset of the block's record in the arena


@dataclass(frozen=True)
class PrefillChunk:
    """Consecutive tokens of one sequence from `start` on; every block up to their end is resident."""

    slot: int
    start: int
    row_table: Tensor  # i32 [M]
    key_table: Tensor  # i32 [M]
    c128_table: Tensor  # i32 [M]


class PoolLayers:
    """Single layers of the pools, as `forepage_kernels` and the compressors take them."""

    def __init__(self, geometry: KvGeometry, pools: KvPools) -> None:
        self.geometry = geometry
        self._pools = pools

    def rows(self, c4_idx: int) -> RowPool:
        """c4 rows of the c4_idx-th c4 layer: slot = row block id * 64 + entry % 64."""
        offset = c4_idx * self.geometry.rows_plane_bytes
        return RowPool(self._pools.rows, offset, row_layout(self.geometry, BLOCK_ENTRIES))

    def keys(self, c4_idx: int) -> KeyPool:
        """Indexer keys of the c4_idx-th c4 layer: slot = key block id * 64 + entry % 64."""
        offset = c4_idx * self.geometry.keys_plane_bytes
        return KeyPool(self._pools.keys, offset, key_layout(self.geometry))

    def row_state(self, c4_idx: int) -> Tensor:
        """Main compressor's state of the c4_idx-th c4 layer: f32 [num_slots, 2, 8, 2 * head_dim]."""
        return self._pools.c4_state[:, c4_idx]

    def key_state(self, c4_idx: int) -> Tensor:
        """Indexer compressor's state of the c4_idx-th c4 layer: f32 [num_slots, 2, 8, 2 * index_dims]."""
        return self._pools.key_state[:, c4_idx]

    def c128_state(self, c128_idx: int) -> Tensor:
        """State of the c128_idx-th c128 layer: f32 [num_slots, 2, 128, head_dim]."""
        return self._pools.c128_state[:, c128_idx]

    def c128(self, c128_idx: int) -> RowPool:
        """Rows of the c128_idx-th c128 layer: slot = c128 block id * 2 + entry % 2."""
        offset = c128_idx * self.geometry.c128_plane_bytes
        return RowPool(self._pools.c128, offset, row_layout(self.geometry, self.geometry.c128_rows_per_block))

    def window(self, layer: int) -> RowPool:
        """Sliding-window rows of a layer: slot = sequence slot * window_tokens + token % window_tokens."""
        offset = layer * self.geometry.window_plane_bytes
        return RowPool(self._pools.window, offset, row_layout(self.geometry, self.geometry.window_tokens))


def row_layout(geometry: KvGeometry, entries: int) -> RowLayout:
    """The model's row format in planes of `entries` rows."""
    return RowLayout(entries, geometry.nope_dims, geometry.rope_dims, _format(geometry))


def key_layout(geometry: KvGeometry) -> KeyLayout:
    """One layer's indexer keys of a block."""
    return KeyLayout(geometry.block_entries, geometry.index_dims, geometry.key_format.value)


def block_slots(table: Tensor, entries: Tensor, per_block: int) -> Tensor:
    """Pool slots i64 of compressed entries through a block table; NOT_RESIDENT where the block is absent.

    Shapes: table i32 [B, M], entries i64 [B, K] (>= 0, < M * per_block) -> [B, K].
    """
    block_ids = table.gather(1, entries // per_block).long()
    return torch.where(block_ids >= 0, block_ids * per_block + entries % per_block, NOT_RESIDENT)


def _format(geometry: KvGeometry) -> Format:
    return "fp32" if geometry.format is KvFormat.FP32 else "fp8"
