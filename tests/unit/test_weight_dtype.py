"""Weights in bf16 and as stored: what is held was counted, starts take little more, logits stay near."""

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

from forepage.errors import ModelFormatError
from forepage.kv.geometry import KvFormat, KvGeometry
from forepage.model.footprint import held_bytes
from forepage.model.held_form import HeldForm
from forepage.model.kv_pools import DecodeBatch, KvPools, PoolCapacity, PrefillChunk
from forepage.model.rank_group import ALONE, RankGroup
from forepage.model.spec import ModelSpec
from forepage.model.stored_form import Form, announced_tensors
from forepage.model.tensor_parallel import rank_spans
from forepage.model.transformer import Transformer
from forepage.model.weights import load_or_seed, seeded_weights
from forepage.settings import ModelSettings, WeightDtype
from forepage.worker.assembly import ModelFolder
from rigs.checkpoint_writer import stored_tensors, write_checkpoint
from rigs.parity import ATOL, MIXED
from rigs.parity_oracle import read_by_oracle, run_built
from rigs.ranks import on_ranks

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


def load(
    folder: Path, spec: ModelSpec, dtype: WeightDtype, *, rank: int = 0, num_ranks: int = 1
) -> dict[str, Tensor]:
    keep = dtype is WeightDtype.STORED
    place = {"rank": rank, "num_ranks": num_ranks}
    return load_or_seed(folder, spec, dtype=DTYPES[dtype], keep_stored=keep, device=CPU, **place)


@torch.inference_mode()
def logits(
    folder: Path, dtype: WeightDtype, config: Mapping[str, object] = SMOOTH, ranks: RankGroup = ALONE
) -> Logits:
    """In the fp32 KV format, whose rows aren't rounded."""
    spec, geometry = ModelSpec.from_config(config), KvGeometry.from_config(config, KvFormat.FP32)
    weights = load(folder, spec, dtype, rank=ranks.rank, num_ranks=ranks.num_ranks)
    model = Transformer(spec, geometry, weights, CPU, ranks=ranks)
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
    wide, narrow = (logits(folder, dtype) for dtype in (WeightDtype.FP32, WeightDtype.BF16))
    num_roundings = ROUNDINGS_PER_LAYER * ModelSpec.from_config(SMOOTH).num_layers + LAST_ROUNDINGS
    allowed = UNIT_ROUNDOFF / math.sqrt(3) * math.sqrt(num_roundings)
    for expected, found in ((wide.prefilled, narrow.prefilled), (wide.decoded, narrow.decoded)):
        assert 0.8 < expected.std() < 1.2
        error = (found - expected) / expected.std()
        assert error.square().mean().sqrt() < allowed
        assert error.abs().max() < LARGEST_IN_STD * allowed
        assert error.square().mean().sqrt() > UNIT_ROUNDOFF / math.sqrt(3), "nothing was computed in bf16"


@pytest.mark.parametrize("config", [SMOOTH, ALIGNED, FEW_CHOSEN], ids=["cut", "aligned", "few"])
def test_stored_weights_mean_what_their_dequantised_ones_do(
    tmp_path: Path, config: dict[str, object]
) -> None:
    """Only the order of sums differs, on one rank and on two."""
    folder = official_folder(tmp_path, config)
    expected = logits(folder, WeightDtype.FP32, config)
    found = [logits(folder, WeightDtype.STORED, config)]
    found += on_ranks(2, lambda ranks: logits(folder, WeightDtype.STORED, config, ranks))
    assert 0.5 < expected.prefilled.std() < 2
    for each in found:
        torch.testing.assert_close(each.prefilled, expected.prefilled, atol=ATOL, rtol=0)
        torch.testing.assert_close(each.decoded, expected.decoded, atol=ATOL, rtol=0)


@torch.inference_mode()
def test_stored_weights_say_what_transformers_says_of_the_folder(tmp_path: Path) -> None:
    config = ALIGNED | {"moe_intermediate_size": 128, "num_nextn_predict_layers": 1}
    folder = official_folder(tmp_path, config)
    tokens = torch.randint(300, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0))
    expected = run_built(read_by_oracle(folder), tokens).logits
    found = logits(folder, WeightDtype.STORED, config)
    both = torch.cat((found.prefilled, found.decoded))
    torch.testing.assert_close(both, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_quantised_matrices_keep_their_bytes(tmp_path: Path, num_ranks: int) -> None:
    folder, spec = official_folder(tmp_path, ALIGNED), ModelSpec.from_config(ALIGNED)
    stored = stored_tensors(ALIGNED)
    for rank in range(num_ranks):
        weights = load(folder, spec, WeightDtype.STORED, rank=rank, num_ranks=num_ranks)
        kept = [name for name in weights if name.endswith(".scale")]
        held = rank_spans(spec, rank=rank, num_ranks=num_ranks)
        assert len(kept) == sum(name.removesuffix("weight") + "scale" in stored for name in held)
        for name in kept:
            weight = name.removesuffix("scale") + "weight"
            span = held[weight]
            unit = Form.FP4 if stored[weight].dtype == torch.int8 else Form.FP8
            for part, units in ((weight, unit.values), (name, unit.scales)):
                assert units is not None
                there = span.stored(units)
                expected = stored[part].view(torch.uint8)[there.rows, there.columns]
                assert torch.equal(weights[part].view(torch.uint8), expected), part


def test_matrices_whose_scales_a_rank_would_cut_are_dequantised(tmp_path: Path) -> None:
    folder, spec = official_folder(tmp_path, QUANTISED), ModelSpec.from_config(QUANTISED)
    weights = load(folder, spec, WeightDtype.STORED, rank=1, num_ranks=2)
    plain = load(folder, spec, WeightDtype.FP32, rank=1, num_ranks=2)
    assert "layers.2.attn.wo_a.scale" not in weights  # the rank's rows begin in the middle of a square
    assert torch.equal(weights["layers.2.attn.wo_a.weight"], plain["layers.2.attn.wo_a.weight"])
    assert weights["layers.2.attn.wq_a.scale"].dtype == torch.float8_e8m0fnu
    assert weights["layers.2.ffn.experts.5.w2.weight"].dtype == torch.uint8


def test_fp8_experts_are_dequantised(tmp_path: Path) -> None:
    config = QUANTISED | {"expert_dtype": "fp8"}
    folder, spec = official_folder(tmp_path, config), ModelSpec.from_config(config)
    weights, plain = (load(folder, spec, dtype) for dtype in (WeightDtype.STORED, WeightDtype.FP32))
    name = "layers.1.ffn.experts.2.w3.weight"
    assert torch.equal(weights[name], plain[name])


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("layers.1.attn.wkv.weight", 0x7F, "holds values that are no numbers"),
        ("layers.1.attn.wkv.weight", 0xFF, "holds values that are no numbers"),
        ("layers.1.ffn.experts.3.w1.scale", 129, r"has a scale of 2\^2, more than 2\^1"),
        ("layers.1.ffn.experts.3.w1.scale", 255, r"has a scale of 2\^128"),
    ],
)
def test_what_kernels_do_not_decode_is_refused_as_stored(
    tmp_path: Path, name: str, code: int, says: str
) -> None:
    stored, spec = stored_tensors(QUANTISED), ModelSpec.from_config(QUANTISED)
    stored[name].view(torch.uint8)[-1, -1] = code
    write_checkpoint(tmp_path, QUANTISED, stored)
    weight = name.removesuffix("scale").removesuffix("weight") + "weight"
    with pytest.raises(ModelFormatError, match=rf"safetensors: {weight} {says}.*WEIGHT_DTYPE to bf16"):
        load(tmp_path, spec, WeightDtype.STORED)
    load(tmp_path, spec, WeightDtype.BF16)


def test_experts_stored_in_two_forms_are_refused_as_stored(tmp_path: Path) -> None:
    stored, spec = stored_tensors(QUANTISED), ModelSpec.from_config(QUANTISED)
    name = "layers.2.ffn.experts.3.w2"
    del stored[f"{name}.scale"]
    stored[f"{name}.weight"] = torch.zeros(spec.hidden_size, spec.expert_size, dtype=torch.bfloat16)
    write_checkpoint(tmp_path, QUANTISED, stored)
    with pytest.raises(ModelFormatError, match=rf"{name}.weight is stored in another form than layers.2"):
        load(tmp_path, spec, WeightDtype.STORED)
    load(tmp_path, spec, WeightDtype.FP32)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_loaded_and_seeded_weights_take_the_bytes_that_are_announced(
    tmp_path: Path, dtype: WeightDtype, num_ranks: int
) -> None:
    folder, spec = official_folder(tmp_path, QUANTISED), ModelSpec.from_config(QUANTISED)
    form = HeldForm.of(dtype, "cpu")
    loaded = held_bytes(spec, num_ranks, form, announced_tensors(spec, QUANTISED))
    seeded = held_bytes(spec, num_ranks, form)
    for rank in range(num_ranks):
        place = {"rank": rank, "num_ranks": num_ranks}
        for announced, weights in (
            (loaded, load(folder, spec, dtype, **place)),
            (seeded, seeded_weights(spec, 1, dtype=DTYPES[dtype], device=CPU, **place)),
        ):
            storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in weights.values()}
            held = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
            assert held == announced


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_workers_start_takes_little_more_memory_than_it_leaves(tmp_path: Path, dtype: WeightDtype) -> None:
    large = official_folder(tmp_path / "large", LARGE)
    small = official_folder(tmp_path / "small", QUANTISED)
    spec = ModelSpec.from_config(LARGE)
    held = held_bytes(spec, 1, HeldForm.of(dtype, "cpu"), announced_tensors(spec, LARGE))
    assert held > 300_000_000
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
    ("asked", "device", "quantised", "held"),
    [
        (WeightDtype.AUTO, "cpu", True, WeightDtype.FP32),
        (WeightDtype.AUTO, "cuda", True, WeightDtype.STORED),
        (WeightDtype.AUTO, "cuda", False, WeightDtype.BF16),
        (WeightDtype.STORED, "cpu", True, WeightDtype.STORED),
        (WeightDtype.STORED, "cpu", False, WeightDtype.FP32),
        (WeightDtype.STORED, "cuda", False, WeightDtype.BF16),
        (WeightDtype.BF16, "cpu", True, WeightDtype.BF16),
        (WeightDtype.FP32, "cuda", True, WeightDtype.FP32),
    ],
)
def test_dtype_left_to_us_goes_by_device_and_checkpoint(
    asked: WeightDtype, device: str, quantised: bool, held: WeightDtype
) -> None:
    assert asked.on(device, quantised=quantised) is held


def test_workers_of_another_dtype_do_not_share_blocks() -> None:
    folders = {
        dtype: ModelFolder.read(ModelSettings(weight_dtype=dtype, device="cpu")) for dtype in WeightDtype
    }
    plain = {dtype: folder.held.plain for dtype, folder in folders.items()}
    assert plain == {dtype: "BF16" if dtype is WeightDtype.BF16 else "F32" for dtype in WeightDtype}
    assert not any(folder.held.keeps_stored for folder in folders.values())  # it has no quantised weights
    assert folders[WeightDtype.STORED].fingerprint == folders[WeightDtype.FP32].fingerprint
    assert folders[WeightDtype.AUTO].fingerprint == folders[WeightDtype.FP32].fingerprint
    assert folders[WeightDtype.AUTO].fingerprint != folders[WeightDtype.BF16].fingerprint
