"""Weights in bf16: what is held is what was counted, a start takes little more, logits stay near fp32's."""

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from forepage.kv.geometry import KvFormat, KvGeometry
from forepage.model.footprint import held_bytes
from forepage.model.kv_pools import DecodeBatch, KvPools, PoolCapacity, PrefillChunk
from forepage.model.spec import ModelSpec
from forepage.model.transformer import Transformer
from forepage.model.weights import load_or_seed, seeded_weights
from forepage.settings import ModelSettings, WeightDtype
from forepage.worker.assembly import ModelFolder
from rigs.checkpoint_writer import stored_tensors, write_checkpoint
from rigs.parity import MIXED

CPU = torch.device("cpu")
DTYPES = {WeightDtype.FP32: torch.float32, WeightDtype.BF16: torch.bfloat16}
QUANTISED: dict[str, object] = {
    **MIXED,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "expert_dtype": "fp4",
}
SMOOTH: dict[str, object] = {**QUANTISED, "num_experts_per_tok": MIXED["n_routed_experts"]}
"""Every expert and every entry is taken, so no choice can tip: what differs is rounding alone."""
LARGE: dict[str, object] = {
    **QUANTISED,
    "vocab_size": 40_000,
    "hidden_size": 1024,
    "num_hidden_layers": 3,
    "compress_ratios": [0, 4, 128, 0],
    "moe_intermediate_size": 4096,
    "n_routed_experts": 2,
    "num_hash_layers": 1,
}
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

OVERHEAD_BYTES = 64 << 20
"""Memory a start may take beside what it leaves; the promise is 1 GiB."""
MEASURE = """
import json, sys, torch
from dataclasses import fields
from pathlib import Path
from forepage.model.rank_group import ALONE
from forepage.settings import ModelSettings, WorkerSettings
from forepage.worker.assembly import ModelFolder, assemble_rank

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))

def start(path):
    folder = ModelFolder.read(ModelSettings(path=path, weight_dtype=sys.argv[3], device="cpu"))
    settings = WorkerSettings(kv_bytes=16 << 20, max_running=1, escalation_reserve_bytes=0)
    arena = torch.zeros(folder.geometry.slot_bytes, dtype=torch.uint8)
    return assemble_rank(settings, folder, torch.device("cpu"), arena, ranks=ALONE)

large, warm_up = map(Path, sys.argv[1:3])
start(warm_up).copies.close()
before = status("VmRSS")
device = start(large)
pools = sum(getattr(device.memory.pools, field.name).nbytes for field in fields(device.memory.pools))
left, peak = status("VmRSS") - before, status("VmHWM") - before
device.copies.close()
print(json.dumps({"pools": pools, "left": left, "peak": peak}), file=sys.stderr)
"""


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


@torch.inference_mode()
def logits(folder: Path, dtype: torch.dtype) -> Logits:
    """In the fp32 KV format, whose rows aren't rounded."""
    spec, geometry = ModelSpec.from_config(SMOOTH), KvGeometry.from_config(SMOOTH, KvFormat.FP32)
    model = Transformer(spec, geometry, load_or_seed(folder, spec, dtype=dtype, device=CPU), CPU)
    tokens = torch.randint(spec.vocab_size, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0))
    blocks = geometry.num_blocks(NUM_TOKENS)
    pools = KvPools.poisoned(geometry, PoolCapacity(1, blocks, blocks, blocks), CPU)
    table = torch.arange(blocks, dtype=torch.int32)
    first = NUM_TOKENS - NUM_DECODED
    place = PrefillChunk(0, 0, table, table, table)
    prefilled = model.prefill(tokens[:first], place, pools, all_logits=True).logits
    decoded = []
    for position in range(first, NUM_TOKENS):
        tables = table.unsqueeze(0)
        batch = DecodeBatch(
            slots=torch.tensor([0]),
            positions=torch.tensor([position]),
            row_table=tables,
            key_table=tables,
            c128_table=tables,
            staging=torch.full((1, 4), -1),
            arena_offsets=torch.full(tables.shape, -1),
        )
        decoded.append(model.decode(tokens[position : position + 1], batch, pools, None).logits)
    return Logits(prefilled, torch.cat(decoded))


def test_bf16_logits_differ_from_fp32_ones_by_its_roundings(tmp_path: Path) -> None:
    """Errors of separate roundings add up like a random walk, and norms keep any from growing.

    One rounding's error is spread evenly over at most a unit roundoff, so its standard deviation is that
    over sqrt(3). The weights are the release's, which bf16 holds without loss.
    """
    folder = official_folder(tmp_path, SMOOTH)
    wide, narrow = (logits(folder, dtype) for dtype in DTYPES.values())
    num_roundings = ROUNDINGS_PER_LAYER * ModelSpec.from_config(SMOOTH).num_layers + LAST_ROUNDINGS
    allowed = UNIT_ROUNDOFF / math.sqrt(3) * math.sqrt(num_roundings)
    for expected, found in ((wide.prefilled, narrow.prefilled), (wide.decoded, narrow.decoded)):
        assert 0.8 < expected.std() < 1.2
        error = (found - expected) / expected.std()
        assert error.square().mean().sqrt() < allowed
        assert error.abs().max() < LARGEST_IN_STD * allowed
        assert error.square().mean().sqrt() > UNIT_ROUNDOFF / math.sqrt(3), "nothing was computed in bf16"


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_loaded_and_seeded_weights_take_the_bytes_that_are_announced(
    tmp_path: Path, dtype: WeightDtype, num_ranks: int
) -> None:
    folder, spec = official_folder(tmp_path, QUANTISED), ModelSpec.from_config(QUANTISED)
    announced = held_bytes(spec, num_ranks, dtype)
    for rank in range(num_ranks):
        how = {"device": CPU, "rank": rank, "num_ranks": num_ranks}
        for weights in (
            load_or_seed(folder, spec, dtype=DTYPES[dtype], **how),  # type: ignore[arg-type]
            seeded_weights(spec, 1, dtype=DTYPES[dtype], **how),  # type: ignore[arg-type]
        ):
            storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in weights.values()}
            held = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
            assert held == announced


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_workers_start_takes_little_more_memory_than_it_leaves(tmp_path: Path, dtype: WeightDtype) -> None:
    large = official_folder(tmp_path / "large", LARGE)
    small = official_folder(tmp_path / "small", QUANTISED)
    held = held_bytes(ModelSpec.from_config(LARGE), 1, dtype)
    assert held > 400_000_000
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large), str(small), dtype.value],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stderr.splitlines()[-1])
    assert measured["left"] > held
    assert measured["left"] < held + measured["pools"] + OVERHEAD_BYTES // 2
    assert measured["peak"] < held + measured["pools"] + OVERHEAD_BYTES


@pytest.mark.parametrize(
    ("asked", "device", "held"),
    [
        (WeightDtype.AUTO, "cpu", WeightDtype.FP32),
        (WeightDtype.AUTO, "cuda", WeightDtype.BF16),
        (WeightDtype.BF16, "cpu", WeightDtype.BF16),
        (WeightDtype.FP32, "cuda", WeightDtype.FP32),
    ],
)
def test_dtype_left_to_us_goes_by_the_device(asked: WeightDtype, device: str, held: WeightDtype) -> None:
    assert asked.on(device) is held


def test_workers_of_another_dtype_do_not_share_blocks() -> None:
    folders = {
        dtype: ModelFolder.read(ModelSettings(weight_dtype=dtype, device="cpu")) for dtype in WeightDtype
    }
    assert {dtype: folder.weight_dtype for dtype, folder in folders.items()} == {
        WeightDtype.AUTO: torch.float32,
        **DTYPES,
    }
    assert folders[WeightDtype.AUTO].fingerprint == folders[WeightDtype.FP32].fingerprint
    assert folders[WeightDtype.AUTO].fingerprint != folders[WeightDtype.BF16].fingerprint
