"""Decode steps without a worker: pools, tables, an arena and a schedule of what is resident when.

Every sequence is prefilled, its full blocks are written to the arena; then steps run, and between them blocks
are dropped (their places poisoned), loaded elsewhere and pulled, as a worker would.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path

import torch

from forepage.kv.geometry import BLOCK_ENTRIES, KvGeometry
from forepage.kv.resident_set import NOT_RESIDENT
from forepage.model.checkpoint_reader import TORCH_DTYPES
from forepage.model.kv_pools import NAN_BYTE
from forepage.model.spec import ModelSpec
from forepage.model.transformer import Transformer
from forepage.model.weights import load_or_seed
from forepage.settings import SEEDED_MODEL, ModelSettings, WeightDtype
from forepage.telemetry import open_telemetry
from forepage.worker.assembly import ModelFolder
from forepage.worker.commands import ALL_PARTS, BlockLoad, PrefillMore, PrefillStep, Table
from forepage.worker.copy_engine import BlockStore, CopyEngine
from forepage.worker.gpu_blocks import PoolSizes
from forepage.worker.kv_memory import KvMemory
from forepage.worker.launched_step import DecodeRow
from forepage.worker.padded_decode import PaddedDecode, PaddedStep
from forepage.worker.rank_device import RankDevice
from forepage.worker.sampler import Row, Sampling
from rigs.worker import text_tokens

GREEDY = Sampling(0.0, 1.0, 0, 0.0, 0)


@dataclass
class Held:
    """One sequence: what it holds, where its records lie."""

    slot: int
    position: int
    token: int | None
    sampling: Sampling
    pulls: bool = False
    rows: dict[int, int] = field(default_factory=dict)
    keys: dict[int, int] = field(default_factory=dict)
    offsets: dict[int, int] = field(default_factory=dict)


class DecodeRig:
    """Sequences on one device."""

    def __init__(
        self,
        device: torch.device,
        *,
        num_sequences: int,
        blocks_each: int,
        max_graphs: int,
        path: Path = SEEDED_MODEL,
        dtype: WeightDtype = WeightDtype.FP32,
    ) -> None:
        self.device = device
        folder = ModelFolder.read(ModelSettings(path=path, device=str(device), weight_dtype=dtype))
        self.spec: ModelSpec = folder.spec
        self.geometry: KvGeometry = folder.geometry
        weights = load_or_seed(path, folder.spec, dtype=TORCH_DTYPES[folder.held.plain], device=device)
        targets = folder.spec.c4_layers[:2]
        model = Transformer(folder.spec, folder.geometry, weights, device, target_layers=targets)
        staging = -(-folder.spec.index_topk // BLOCK_ENTRIES)
        spare = 2 * num_sequences
        num_blocks = num_sequences * (blocks_each + staging) + spare
        self.sizes = PoolSizes(
            row_blocks=num_blocks,
            key_blocks=num_blocks,
            key_reserve=0,
            c128_blocks=num_blocks,
            slots=num_sequences,
            table_blocks=blocks_each,
            staging_blocks=staging,
        )
        self.memory = KvMemory(folder.geometry, self.sizes, device)
        for pool in (self.memory.pools.rows, self.memory.pools.keys, self.memory.pools.c128):
            pool.fill_(NAN_BYTE)
        slots = num_sequences * blocks_each
        is_cuda = device.type == "cuda"
        self.arena = torch.zeros(slots * self.geometry.slot_bytes, dtype=torch.uint8, pin_memory=is_cuda)
        self.copies = CopyEngine(self.memory.pools, self.arena, folder.geometry)
        self.local = RankDevice(model, self.memory, self.copies, self.arena)
        self.telemetry = open_telemetry("rig", instance_id="rig")
        self.decode = PaddedDecode(
            self.local, max_rows=num_sequences, max_graphs=max_graphs, telemetry=self.telemetry
        )
        self.free_rows = list(range(num_blocks))[::-1]
        self.free_keys = list(range(num_blocks))
        self.held: list[Held] = []
        self.blocks_each = blocks_each

    def close(self) -> None:
        """Wait for copies and end their thread."""
        self.copies.close()
        self.telemetry.close()

    def add(
        self,
        prompt: Seq[int],
        sampling: Sampling = GREEDY,
        *,
        parts_at_once: int = ALL_PARTS,
        between: Callable[[], object] = int,
    ) -> Held:
        """Prefill a sequence; its full blocks go to the arena, its last token waits for the first step.

        So many parts at once, and `between` is called between two of them.
        """
        slot = len(self.held)
        one = Held(slot, len(prompt) - 1, prompt[-1], sampling)
        self.held.append(one)
        self.memory.clear_slot(slot)
        for idx in range(self.blocks_each):
            one.rows[idx], one.keys[idx] = self.free_rows.pop(), self.free_keys.pop()
        c128 = range(slot * self.blocks_each, (slot + 1) * self.blocks_each)
        self.memory.set_table(Table.ROWS, slot, list(one.rows.values()))
        self.memory.set_table(Table.KEYS, slot, list(one.keys.values()))
        self.memory.set_table(Table.C128, slot, c128)
        self.local.run(PrefillStep(slot, 0, tuple(prompt[:-1]), num_parts=parts_at_once))
        while self.local.has_chunk:
            between()
            self.local.run(PrefillMore(parts_at_once))
        full = (len(prompt) - 1) // self.geometry.block_tokens
        one.offsets = {idx: (slot * self.blocks_each + idx) * self.geometry.slot_bytes for idx in range(full)}
        stores = [
            BlockStore(one.rows[idx], one.keys[idx], c128[idx], offset) for idx, offset in one.offsets.items()
        ]
        self.copies.store(stores).result()
        self.memory.edit_table(Table.ARENA, slot, one.offsets, list(one.offsets.values()))
        return one

    def stage(self, one: Held) -> None:
        """Let it pull rows."""
        one.pulls = True
        staging = [self.free_rows.pop() for _ in range(self.sizes.staging_blocks)]
        self.memory.set_table(Table.STAGING, one.slot, staging)

    def drop(self, one: Held, idx: int, *, keys: bool) -> None:
        """Take a block out of the tables; what lies in its place is poisoned behind the steps launched."""
        self.memory.edit_table(Table.ROWS, one.slot, [idx], [NOT_RESIDENT])
        row_id = one.rows.pop(idx)
        self.memory.pools.rows[row_id].fill_(NAN_BYTE)
        self.free_rows.insert(0, row_id)
        if keys:
            self.memory.edit_table(Table.KEYS, one.slot, [idx], [NOT_RESIDENT])
            key_id = one.keys.pop(idx)
            self.memory.pools.keys[key_id].fill_(NAN_BYTE)
            self.free_keys.insert(0, key_id)

    def start_load(self, one: Held, idx: int) -> Callable[[], None]:
        """Load an absent block to places that were freed last; the call waits for it and commits."""
        row_id, key_id = self.free_rows.pop(0), self.free_keys.pop(0) if idx not in one.keys else -1
        future = self.copies.load([BlockLoad(one.offsets[idx], row_id, key_id)])

        def commit() -> None:
            future.result()
            one.rows[idx] = row_id
            self.memory.edit_table(Table.ROWS, one.slot, [idx], [row_id])
            if key_id >= 0:
                one.keys[idx] = key_id
                self.memory.edit_table(Table.KEYS, one.slot, [idx], [key_id])

        return commit

    def launch(self, held: Seq[Held] | None = None, *, taps: Seq[int] = ()) -> PaddedStep:
        """One step of all these; tokens after the first feed themselves on the device."""
        held = self.held if held is None else held
        rows = [
            DecodeRow(
                slot=one.slot,
                position=one.position,
                token=one.token,
                sampling=Row(one.sampling, one.position + 1),
                wants_tap=at in taps,
                pulls=one.pulls,
            )
            for at, one in enumerate(held)
        ]
        step = self.decode.launch(rows)
        for one in held:
            one.position += 1
            one.token = None
        return step


def prompts(count: int, num_tokens: int) -> list[list[int]]:
    """Different texts of about that length."""
    return [text_tokens(num_tokens + 3 * (seed % 5), seed) for seed in range(count)]
