"""What all layers of one step share: positions, rotations and pool slots, computed once per step.

`DecodeStep` is one token of each of B sequences, `PrefillStep` consecutive tokens of one. Slots are the
same in every layer, since a pool's layers differ only in their offset inside a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from forepage.errors import IntegrityError
from forepage.kv.geometry import BLOCK_ENTRIES, C4_RATIO, C128_RATIO, KvGeometry
from forepage.model.compressor import EntryTarget
from forepage.model.kv_pools import NOT_RESIDENT, DecodeBatch, PrefillChunk, block_slots
from forepage.model.rope import RopeFrequencies, Rotation, rotation
from forepage_kernels.layout import KeyPool, RowPool


@dataclass(frozen=True)
class TokenRopes:
    """Rotations at the step's tokens, for layers without and with a compressor."""

    window: Rotation
    compressed: Rotation

    @classmethod
    def at(cls, positions: Tensor, frequencies: RopeFrequencies) -> "TokenRopes":
        """positions i64 [n]."""
        return cls(
            window=rotation(positions, frequencies.window),
            compressed=rotation(positions, frequencies.compressed),
        )


@dataclass(frozen=True)
class NewEntries:
    """Entries that a step may close: i64 [n] slots in one pool, negative where none is closed."""

    slots: Tensor
    rope: Rotation  # at each entry's first token

    def into(self, pool: RowPool | KeyPool) -> EntryTarget:
        """The same entries as a compressor of one layer takes them."""
        return EntryTarget(pool=pool, slots=self.slots, rope=self.rope)


@dataclass(frozen=True)
class DecodeStep:
    """One token of each of B sequences."""

    batch: DecodeBatch
    ropes: TokenRopes
    window_store: Tensor  # i64 [B]
    window_slots: Tensor  # i64 [B, W] oldest first, NOT_RESIDENT at the end
    new_rows: NewEntries
    new_keys: NewEntries
    new_c128: NewEntries
    c4_visible: Tensor  # i64 [B] entries this token may select from
    c128_slots: Tensor  # i64 [B, 2 * M] every visible row, NOT_RESIDENT elsewhere

    @classmethod
    def plan(cls, batch: DecodeBatch, geometry: KvGeometry, frequencies: RopeFrequencies) -> "DecodeStep":
        """Pure index arithmetic on the batch's device."""
        positions, per_block = batch.positions, geometry.c128_rows_per_block
        c4_rope = rotation(positions - positions % C4_RATIO, frequencies.compressed)
        c128_rope = rotation(positions - positions % C128_RATIO, frequencies.compressed)

        def closed(table: Tensor, ratio: int, entries: int, rope: Rotation) -> NewEntries:
            return NewEntries(_closed_slots(table, positions, ratio, entries), rope)

        return cls(
            batch=batch,
            ropes=TokenRopes.at(positions, frequencies),
            window_store=_ring_slots(batch.slots, positions, geometry.window_tokens),
            window_slots=_window_slots(batch.slots, positions, geometry.window_tokens),
            new_rows=closed(batch.row_table, C4_RATIO, BLOCK_ENTRIES, c4_rope),
            new_keys=closed(batch.key_table, C4_RATIO, BLOCK_ENTRIES, c4_rope),
            new_c128=closed(batch.c128_table, C128_RATIO, per_block, c128_rope),
            c4_visible=(positions + 1) // C4_RATIO,
            c128_slots=_visible_slots(batch.c128_table, (positions + 1) // C128_RATIO, per_block),
        )


@dataclass(frozen=True)
class PrefillStep:
    """S consecutive tokens of one sequence, from `start` on."""

    slot: int
    start: int
    num_tokens: int
    ropes: TokenRopes
    new_rows: NewEntries
    new_keys: NewEntries
    new_c128: NewEntries
    row_slots: Tensor  # i64 [N] of every c4 entry up to the chunk's end
    key_slots: Tensor  # i64 [N]
    c128_slots: Tensor  # i64 [end // 128]
    mass_tokens: int  # of so many of the last ones the attention mass is wanted

    @classmethod
    def plan(
        cls,
        chunk: PrefillChunk,
        num_tokens: int,
        geometry: KvGeometry,
        frequencies: RopeFrequencies,
        *,
        mass_tokens: int = 0,
    ) -> "PrefillStep":
        """Index arithmetic on the tables' device. Raises: IntegrityError if a block is not resident."""
        device, end = chunk.row_table.device, chunk.start + num_tokens
        row_slots = _first_slots(chunk.row_table, end // C4_RATIO, BLOCK_ENTRIES)
        key_slots = _first_slots(chunk.key_table, end // C4_RATIO, BLOCK_ENTRIES)
        c128_slots = _first_slots(chunk.c128_table, end // C128_RATIO, geometry.c128_rows_per_block)
        if bool(torch.cat((row_slots, key_slots, c128_slots)).lt(0).any()):
            raise IntegrityError(f"prefill of tokens {chunk.start}..{end - 1}: a block is not resident")

        def new(slots: Tensor, ratio: int) -> NewEntries:
            entries = torch.arange(chunk.start // ratio, end // ratio, device=device)
            return NewEntries(
                slots[chunk.start // ratio :], rotation(entries * ratio, frequencies.compressed)
            )

        return cls(
            slot=chunk.slot,
            start=chunk.start,
            num_tokens=num_tokens,
            ropes=TokenRopes.at(torch.arange(chunk.start, end, device=device), frequencies),
            new_rows=new(row_slots, C4_RATIO),
            new_keys=new(key_slots, C4_RATIO),
            new_c128=new(c128_slots, C128_RATIO),
            row_slots=row_slots,
            key_slots=key_slots,
            c128_slots=c128_slots,
            mass_tokens=mass_tokens,
        )


def _ring_slots(slots: Tensor, positions: Tensor, window_tokens: int) -> Tensor:
    return slots * window_tokens + positions % window_tokens


def _window_slots(slots: Tensor, positions: Tensor, window_tokens: int) -> Tensor:
    """Ring slots of tokens max(0, p - W + 1) .. p: [B] -> [B, W]."""
    oldest = (positions - window_tokens + 1).clamp(min=0).unsqueeze(1)
    tokens = oldest + torch.arange(window_tokens, device=positions.device)  # [B, W]
    ring = _ring_slots(slots.unsqueeze(1), tokens, window_tokens)
    return torch.where(tokens <= positions.unsqueeze(1), ring, NOT_RESIDENT)


def _closed_slots(table: Tensor, positions: Tensor, ratio: int, per_block: int) -> Tensor:
    """Where the entry that each token closes is stored; NOT_RESIDENT when it closes none. i64 [B]."""
    slots = block_slots(table, (positions // ratio).unsqueeze(1), per_block).squeeze(1)
    return torch.where((positions + 1) % ratio == 0, slots, NOT_RESIDENT)


def _visible_slots(table: Tensor, visible: Tensor, per_block: int) -> Tensor:
    """Slots of entries 0 .. visible - 1, then NOT_RESIDENT: [B, M], [B] -> i64 [B, M * per_block]."""
    entries = torch.arange(table.shape[1] * per_block, device=table.device)
    slots = block_slots(table, entries.expand(table.shape[0], -1), per_block)
    return torch.where(entries < visible.unsqueeze(1), slots, NOT_RESIDENT)


def _first_slots(table: Tensor, num_entries: int, per_block: int) -> Tensor:
    """Slots of entries 0 .. num_entries - 1 through a table i32 [M]; IntegrityError if it is too short."""
    if table.shape[0] * per_block < num_entries:
        raise IntegrityError(f"block table of {table.shape[0]} blocks is too short for {num_entries} entries")
    entries = torch.arange(num_entries, device=table.device)
    return block_slots(table.unsqueeze(0), entries.unsqueeze(0), per_block).squeeze(0)
