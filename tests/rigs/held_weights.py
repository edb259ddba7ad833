"""Models of official-format folders in each form that weights are held in, and what they say of one text."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from forepage.kv.geometry import KvFormat, KvGeometry
from forepage.model.kv_pools import DecodeBatch, KvPools, PoolCapacity, PrefillChunk
from forepage.model.rank_group import ALONE, RankGroup
from forepage.model.spec import ModelSpec
from forepage.model.transformer import Transformer
from forepage.model.weights import load_or_seed
from forepage.settings import WeightDtype
from rigs.checkpoint_writer import stored_tensors, write_checkpoint
from rigs.parity_configs import MIXED

CPU = torch.device("cpu")
DTYPES = {
    WeightDtype.FP32: torch.float32,
    WeightDtype.BF16: torch.bfloat16,
    WeightDtype.STORED: torch.float32,
}
"""Setting -> dtype of plain matrices on a CPU."""
QUANTISED: dict[str, object] = {
    **MIXED,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "expert_dtype": "fp4",
}
SMOOTH: dict[str, object] = {**QUANTISED, "num_experts_per_tok": MIXED["n_routed_experts"]}
"""Every expert and every entry is taken, so no choice can tip: what differs is rounding alone."""
ALIGNED: dict[str, object] = {
    **SMOOTH,
    "head_dim": 128,
    "qk_rope_head_dim": 64,
    "hidden_size": 256,
    "o_lora_rank": 128,
    "moe_intermediate_size": 96,
}
"""So large that of two ranks each begins with whole scales."""
FEW_CHOSEN: dict[str, object] = {**ALIGNED, "num_experts_per_tok": 2}
NUM_TOKENS = 300
NUM_DECODED = 24

UNIT_ROUNDOFF = 2.0**-8
"""bf16 keeps 8 bits: a rounding moves a value by at most this share of it."""
ROUNDINGS_PER_LAYER = 20
"""Of what reaches the streams. Attention: its input collapsed, normed, q latent, its norm, q, q rotated, own
row, rows' sum, rotated back, two output products, streams. Experts: input collapsed, normed, up, activated,
down, summed, streams. And one for the sums inside a product, which a backend may keep in parts."""
LAST_ROUNDINGS = 2
"""The streams' last collapse and norm."""
LARGEST_IN_STD = 6.0
"""No error of some 10^5 normal ones is larger: the odds are 2e-4."""


@dataclass(frozen=True)
class Logits:
    """Of one text: of its prefilled tokens and of those decoded after them, f32 [n, vocab]."""

    prefilled: Tensor
    decoded: Tensor


def official_folder(path: Path, config: Mapping[str, object]) -> Path:
    write_checkpoint(path, config, stored_tensors(config))
    indexer = {"target_layers": [0], "threshold": 0.5, "heads": 8, "rank": 8, "seed": 1}
    (path / "memory_indexer.json").write_text(json.dumps(indexer))
    return path


def load(
    folder: Path,
    spec: ModelSpec,
    dtype: WeightDtype,
    *,
    device: torch.device = CPU,
    rank: int = 0,
    num_ranks: int = 1,
) -> dict[str, Tensor]:
    keep = dtype is WeightDtype.STORED
    place = {"rank": rank, "num_ranks": num_ranks}
    plain = torch.bfloat16 if keep and device.type == "cuda" else DTYPES[dtype]
    return load_or_seed(folder, spec, dtype=plain, keep_stored=keep, device=device, **place)


@torch.inference_mode()
def logits(
    folder: Path,
    dtype: WeightDtype,
    config: Mapping[str, object] = SMOOTH,
    *,
    ranks: RankGroup = ALONE,
    device: torch.device = CPU,
) -> Logits:
    """In the fp32 KV format, whose rows aren't rounded."""
    spec, geometry = ModelSpec.from_config(config), KvGeometry.from_config(config, KvFormat.FP32)
    weights = load(folder, spec, dtype, device=device, rank=ranks.rank, num_ranks=ranks.num_ranks)
    model = Transformer(spec, geometry, weights, device, ranks=ranks)
    tokens = torch.randint(spec.vocab_size, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(device)
    blocks = geometry.num_blocks(NUM_TOKENS)
    pools = KvPools.poisoned(geometry, PoolCapacity(1, blocks, blocks, blocks), device)
    table = torch.arange(blocks, dtype=torch.int32, device=device)
    first = NUM_TOKENS - NUM_DECODED
    place = PrefillChunk(0, 0, table, table, table)
    prefilled = model.prefill(tokens[:first], place, pools, all_logits=True).logits
    decoded = []
    for position in range(first, NUM_TOKENS):
        tables = table.unsqueeze(0)
        batch = DecodeBatch(
            slots=torch.tensor([0], device=device),
            positions=torch.tensor([position], device=device),
            row_table=tables,
            key_table=tables,
            c128_table=tables,
            staging=torch.full((1, 4), -1, device=device),
            arena_offsets=torch.full(tables.shape, -1, device=device),
        )
        decoded.append(model.decode(tokens[position : position + 1], batch, pools, None).logits)
    return Logits(prefilled.cpu(), torch.cat(decoded).cpu())


def assert_differ_by_bf16_roundings(found: Logits, wanted: Logits, config: Mapping[str, object]) -> None:
    """`found` was computed in bf16, `wanted` in fp32.

    Errors of separate roundings add up like a random walk, and norms keep any from growing. One rounding's
    error is spread evenly over at most a unit roundoff, so its standard deviation is that over sqrt(3). The
    weights are the release's, which bf16 holds without loss.
    """
    num_roundings = ROUNDINGS_PER_LAYER * ModelSpec.from_config(config).num_layers + LAST_ROUNDINGS
    allowed = UNIT_ROUNDOFF / math.sqrt(3) * math.sqrt(num_roundings)
    for expected, narrow in ((wanted.prefilled, found.prefilled), (wanted.decoded, found.decoded)):
        assert 0.5 < expected.std() < 2
        error = (narrow - expected) / expected.std()
        assert error.square().mean().sqrt() < allowed
        assert error.abs().max() < LARGEST_IN_STD * allowed
        assert error.square().mean().sqrt() > UNIT_ROUNDOFF / math.sqrt(3), "nothing was computed in bf16"
