"""A model with random weights, sequences with a made-up history: enough to time steps, not to read them."""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from forepage.kv.geometry import KeyFormat, KvFormat, KvGeometry
from forepage.kv.resident_set import NOT_RESIDENT
from forepage.model.checkpoint_reader import TORCH_DTYPES
from forepage.model.held_form import HeldForm
from forepage.model.spec import ModelSpec, read_config
from forepage.model.transformer import Transformer
from forepage.model.weight_table import Role, weight_table
from forepage.settings import SEEDED_MODEL
from forepage.telemetry import Telemetry
from forepage.worker.commands import Table
from forepage.worker.copy_engine import CopyEngine
from forepage.worker.gpu_blocks import PoolSizes
from forepage.worker.kv_memory import KvMemory
from forepage.worker.padded_decode import PaddedDecode
from forepage.worker.rank_device import RankDevice

LOW_BYTE, HIGH_BYTE = 0x30, 0x40
"""History is random bytes of this range: finite, and small, as e4m3, bf16, fp32 and as scales."""
SEED = 0
ARENA_RECORDS = 256


@dataclass(frozen=True)
class SyntheticModel:
    """A model's shape and random bf16 weights on a GPU."""

    name: str
    spec: ModelSpec
    geometry: KvGeometry
    weights: Mapping[str, Tensor]

    @classmethod
    def make(cls, name: str, config: Mapping[str, object], device: torch.device) -> "SyntheticModel":
        """Draw the weights."""
        spec = ModelSpec.from_config(config)
        geometry = KvGeometry.from_config(config, KvFormat.FP8, KeyFormat.FP8)
        generator = torch.Generator(device).manual_seed(SEED)
        weights = {}
        for tensor, entry in weight_table(spec).items():
            if entry.role is Role.EXPERT_IDS:
                values = torch.randint(spec.num_experts, entry.shape, device=device, generator=generator)
            else:
                dtype = TORCH_DTYPES[HeldForm("BF16").plain_dtype(entry.role)]
                values = torch.empty(entry.shape, dtype=dtype, device=device)
                bound = 1.0 if len(entry.shape) == 1 else (3.0 / entry.shape[-1]) ** 0.5
                values.uniform_(-bound, bound, generator=generator)
            weights[tensor] = values
        return cls(name, spec, geometry, weights)


def bundled_config() -> dict[str, object]:
    """The model that is shipped."""
    return read_config(SEEDED_MODEL)


def flash_config(*, num_layers: int, num_experts: int) -> dict[str, object]:
    """V4-Flash's sizes, fewer layers (the first two without, the last with top-k attention) and experts."""
    base = bundled_config()
    ratios = [0, 0, *(4 if idx % 2 == 0 else 128 for idx in range(num_layers - 2))]
    return base | {
        "forepage_name": f"flash-{num_layers}-layers",
        "vocab_size": 129_280,
        "hidden_size": 4096,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 64,
        "head_dim": 512,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "compress_ratios": ratios,
        "index_n_heads": 64,
        "index_topk": 512,
        "n_routed_experts": num_experts,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 2048,
    }


class SyntheticDecode:
    """`batch` sequences with `context_tokens` of history behind them, all of it resident."""

    def __init__(
        self,
        model: SyntheticModel,
        *,
        batch: int,
        context_tokens: int,
        more_tokens: int,
        max_graphs: int,
        telemetry: Telemetry,
        resident_share: float = 1.0,
    ) -> None:
        """`more_tokens` is how far they may go on; `max_graphs` 0: every step kernel by kernel.

        `resident_share` below 1: as in `exact`, all keys are there, so much of the rows, the rest is pulled.
        """
        device = next(iter(model.weights.values())).device
        geometry, spec = model.geometry, model.spec
        blocks = geometry.num_blocks(context_tokens + more_tokens)
        staging = -(-spec.index_topk // geometry.block_entries)
        self.pulls = resident_share < 1
        sizes = PoolSizes(
            row_blocks=batch * (blocks + staging),
            key_blocks=batch * blocks,
            key_reserve=0,
            c128_blocks=batch * blocks,
            slots=batch,
            table_blocks=blocks,
            staging_blocks=staging,
        )
        memory = KvMemory(geometry, sizes, device)
        for pool in (memory.pools.rows, memory.pools.keys, memory.pools.c128, memory.pools.window):
            pool.random_(LOW_BYTE, HIGH_BYTE)
        for slot in range(batch):
            for table in (Table.ROWS, Table.KEYS, Table.C128):
                memory.set_table(table, slot, range(slot * blocks, (slot + 1) * blocks))
        arena = torch.zeros(ARENA_RECORDS * geometry.slot_bytes, dtype=torch.uint8, pin_memory=True)
        arena.random_(LOW_BYTE, HIGH_BYTE)
        if self.pulls:
            draw = Random(SEED)
            for slot in range(batch):
                first = batch * blocks + slot * staging
                memory.set_table(Table.STAGING, slot, range(first, first + staging))
                records = [draw.randrange(ARENA_RECORDS) * geometry.slot_bytes for _ in range(blocks)]
                memory.set_table(Table.ARENA, slot, records)
                tail = geometry.num_blocks(context_tokens) - 1
                absent = draw.sample(range(tail), int(tail * (1 - resident_share)))
                memory.edit_table(Table.ROWS, slot, absent, [NOT_RESIDENT] * len(absent))
        targets = spec.c4_layers[:3]
        transformer = Transformer(spec, geometry, model.weights, device, target_layers=targets)
        local = RankDevice(transformer, memory, CopyEngine(memory.pools, arena, geometry), arena)
        self.local = local
        self.steps = PaddedDecode(local, max_rows=batch, max_graphs=max_graphs, telemetry=telemetry)
        self.batch = batch
        self.position = context_tokens

    def close(self) -> None:
        """End the copy thread."""
        self.local.copies.close()
