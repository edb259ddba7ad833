"""An arena file with known indexer keys, written the way workers and the cold pool manager do."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from forepage.coldpool.arena import Arena
from forepage.coldpool.records import RecordInfo, RecordKind, SlotHeader, SlotRef, SlotState
from forepage.kv.geometry import BLOCK_ENTRIES, KvFormat, KvGeometry
from forepage.kv.ids import ArenaId
from forepage.model.kv_pools import key_layout
from forepage.model.spec import ModelSpec
from forepage.settings import SEEDED_MODEL
from forepage_kernels.layout import decode_keys, encode_keys

F64 = npt.NDArray[np.float64]
CONFIG = json.loads((SEEDED_MODEL / "config.json").read_text(encoding="utf-8"))
SPEC = ModelSpec.from_config(CONFIG)


@dataclass(frozen=True)
class KeyArena:
    """The writing end; what it wrote is in `keys`, as a reader of the stored bytes sees it."""

    arena: Arena
    geometry: KvGeometry
    keys: F64  # [num_slots, c4 layers, 64, dims]

    @classmethod
    def create(
        cls, path: Path, *, num_slots: int, kv_format: KvFormat = KvFormat.FP8, seed: int = 0
    ) -> "KeyArena":
        """Every slot free; keys are random but not written yet."""
        geometry = KvGeometry.from_config(CONFIG, kv_format)
        arena = Arena.create(path, slot_bytes=geometry.slot_bytes, num_slots=num_slots)
        shape = (num_slots, len(geometry.c4_layers), BLOCK_ENTRIES, geometry.index_dims)
        plain = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        layout = key_layout(geometry)
        values, scales = encode_keys(plain.reshape(-1, geometry.index_dims), layout)
        stored = decode_keys(values, scales, layout).reshape(shape).double().numpy()
        made = cls(arena, geometry, stored)
        planes = torch.cat(
            (values.reshape(*shape[:2], -1), scales.reshape(*shape[:2], -1)), dim=2
        ).numpy()  # [num_slots, layers, plane bytes]
        for slot in range(num_slots):
            for layer in range(shape[1]):
                made._write_plane(slot, layer, planes[slot, layer].tobytes())
        return made

    def complete(self, slot: int, generation: int = 1) -> SlotRef:
        """The slot says it holds a block at this generation."""
        info = RecordInfo(
            key=slot.to_bytes(32, "little"),
            kind=RecordKind.BLOCK,
            part=0,
            num_parts=1,
            payload_bytes=self.geometry.record_bytes,
            checksum=0,
        )
        self.arena.write_header(ArenaId(slot), SlotHeader(SlotState.COMPLETE, generation, info))
        return SlotRef(ArenaId(slot), generation)

    def rewrite(self, slot: int, generation: int) -> None:
        """The slot was evicted and somebody is writing it."""
        self.arena.write_header(ArenaId(slot), SlotHeader(SlotState.WRITING, generation))

    def damage(self, slot: int, layer: int, byte: int = 0xFF) -> None:
        """Fill one layer's keys of a slot with a byte; 0xFF is NaN in every format."""
        self._write_plane(slot, layer, bytes([byte]) * self.geometry.keys_plane_bytes)

    def _write_plane(self, slot: int, layer: int, data: bytes) -> None:
        start = self.geometry.keys_offset + layer * self.geometry.keys_plane_bytes
        self.arena.payload(ArenaId(slot))[start : start + len(data)] = data


def indexer_logits(q: F64, weights: F64, keys: F64) -> F64:
    """Sum over heads of weight * relu(q . k): q [H, D], weights [H], keys [..., D] -> [...]."""
    logits: F64 = np.maximum(keys @ q.T, 0.0) @ weights
    return logits
