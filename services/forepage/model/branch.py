"""The compressed rows a layer attends beside its window: top-k of a c4 layer, all of a c128 layer.

A branch takes new tokens in, stores the entries they close, and says which rows to attend. Its order
within a step is fixed: index keys, scores, rows, pulls; so the entry closed by a token competes for it.
A selected row that isn't resident is pulled from the host arena into the sequence's staging blocks before
attention reads it; the list of rows keeps its order, so the result is the same bits either way.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from forepage.kv.geometry import BLOCK_ENTRIES, C4_RATIO, C128_RATIO
from forepage.model.compressor import Compressor
from forepage.model.indexer import Indexer, IndexerTap
from forepage.model.kv_pools import DecodeBatch, PoolLayers
from forepage.model.spec import ModelSpec
from forepage.model.step import DecodeStep, PrefillStep
from forepage_kernels.gather_rows import gather_rows
from forepage_kernels.layout import RowPool
from forepage_kernels.resolve_rows import resolve_rows
from forepage_kernels.unpack_rows import unpack_rows


@dataclass(frozen=True)
class Pulls:
    """Rows a layer had to fetch: `pulled` i64 [B] came from the arena, `unserved` i64 [B] could not."""

    pulled: Tensor
    unserved: Tensor


@dataclass(frozen=True)
class DecodeRows:
    """Rows to attend: slots i64 [B, K] of `pool` in ascending entry order, NOT_RESIDENT = none."""

    pool: RowPool | None
    slots: Tensor
    tap: IndexerTap | None = None
    pulls: Pulls | None = None


@dataclass(frozen=True)
class PrefillRows:
    """Every closed entry's stored row, decoded [N, d]; `tap` narrows them per token in c4 layers."""

    rows: Tensor
    ratio: int
    tap: IndexerTap | None = None


@dataclass(frozen=True)
class C4Branch:
    """Compressor and indexer of the c4_idx-th c4 layer."""

    c4_idx: int
    compressor: Compressor
    indexer: Indexer

    def decode(
        self, x: Tensor, latent: Tensor, step: DecodeStep, pools: PoolLayers, arena: Tensor | None
    ) -> DecodeRows:
        """x [B, D], latent [B, q_lora]: one token of each sequence."""
        batch, keys, rows = step.batch, pools.keys(self.c4_idx), pools.rows(self.c4_idx)
        at = {"slots": batch.slots, "positions": batch.positions}
        self.indexer.compressor.decode(x, pools.key_state(self.c4_idx), step.new_keys.into(keys), **at)
        ask = self.indexer.query(x, latent, step.ropes.compressed, keys=keys.layout)
        tap = self.indexer.select(ask, keys, block_table=batch.key_table, visible=step.c4_visible)
        self.compressor.decode(x, pools.row_state(self.c4_idx), step.new_rows.into(rows), **at)
        slots, pulls = _pull_absent(
            tap.selected, batch, rows, arena, self.c4_idx * pools.geometry.rows_plane_bytes
        )
        return DecodeRows(pool=rows, slots=slots, tap=tap, pulls=pulls)

    def prefill(self, x: Tensor, latent: Tensor, step: PrefillStep, pools: PoolLayers) -> PrefillRows:
        """x [S, D], latent [S, q_lora]: consecutive tokens of one sequence."""
        keys, rows = pools.keys(self.c4_idx), pools.rows(self.c4_idx)
        key_state, row_state = pools.key_state(self.c4_idx), pools.row_state(self.c4_idx)
        new_keys, new_rows = step.new_keys.into(keys), step.new_rows.into(rows)
        self.indexer.compressor.prefill(x, key_state[step.slot], new_keys, start=step.start)
        ask = self.indexer.query(x, latent, step.ropes.compressed, keys=keys.layout)
        tap = self.indexer.select_prefill(ask, keys, slots=step.key_slots, start=step.start)
        self.compressor.prefill(x, row_state[step.slot], new_rows, start=step.start)
        return PrefillRows(unpack_rows(rows, step.row_slots, exact_dtype(rows, x.dtype)), C4_RATIO, tap)


@dataclass(frozen=True)
class C128Branch:
    """Compressor of the c128_idx-th c128 layer."""

    c128_idx: int
    compressor: Compressor

    def decode(
        self, x: Tensor, latent: Tensor, step: DecodeStep, pools: PoolLayers, arena: Tensor | None
    ) -> DecodeRows:
        """As C4Branch.decode; c128 rows never leave the GPU, so nothing is selected or pulled."""
        del latent, arena
        batch, rows = step.batch, pools.c128(self.c128_idx)
        state, new = pools.c128_state(self.c128_idx), step.new_c128.into(rows)
        self.compressor.decode(x, state, new, slots=batch.slots, positions=batch.positions)
        return DecodeRows(pool=rows, slots=step.c128_slots)

    def prefill(self, x: Tensor, latent: Tensor, step: PrefillStep, pools: PoolLayers) -> PrefillRows:
        """As C4Branch.prefill, without selection."""
        del latent
        rows = pools.c128(self.c128_idx)
        state, new = pools.c128_state(self.c128_idx)[step.slot], step.new_c128.into(rows)
        self.compressor.prefill(x, state, new, start=step.start)
        return PrefillRows(unpack_rows(rows, step.c128_slots, exact_dtype(rows, x.dtype)), C128_RATIO)


def exact_dtype(pool: RowPool, dtype: torch.dtype) -> torch.dtype:
    """The model's dtype where it holds the pool's rows exactly, else fp32."""
    return torch.float32 if pool.layout.format == "fp32" else dtype


def branch_of(weights: Mapping[str, Tensor], layer: int, spec: ModelSpec) -> C4Branch | C128Branch | None:
    """The branch of a layer, by its compress ratio; None for window-only layers."""
    ratio, prefix = spec.compress_ratios[layer], f"layers.{layer}.attn."
    if ratio == 0:
        return None
    compressor = Compressor.from_weights(weights, f"{prefix}compressor.", ratio, spec)
    if ratio == C128_RATIO:
        return C128Branch(spec.c128_layers.index(layer), compressor)
    indexer = Indexer.from_weights(weights, f"{prefix}indexer.", spec)
    return C4Branch(spec.c4_layers.index(layer), compressor, indexer)


def _pull_absent(
    selected: Tensor, batch: DecodeBatch, pool: RowPool, arena: Tensor | None, plane_offset: int
) -> tuple[Tensor, Pulls]:
    """Slots i64 [B, k] of the selected entries, those that aren't resident fetched into the staging blocks.

    `plane_offset` is where the layer's rows begin in a block record.
    """
    resolved = resolve_rows(
        selected,
        batch.row_table,
        staging=batch.staging if arena is not None else batch.staging[:, :0].contiguous(),
        records=batch.arena_offsets,
        plane_offset=plane_offset,
        block_entries=BLOCK_ENTRIES,
    )
    if arena is not None:
        gather_rows(
            pool,
            arena,
            slots=resolved.pull_slots,
            plane_offsets=resolved.plane_offsets,
            entries=resolved.entries,
        )
    return resolved.slots, Pulls(resolved.pulled, resolved.unserved)
