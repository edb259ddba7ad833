"""Weights in bf16 and as stored: what is held was counted, starts take little more, logits stay near."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from forepage.model.footprint import held_bytes
from forepage.model.held_form import HeldForm
from forepage.model.spec import ModelSpec
from forepage.model.stored_form import announced_tensors
from forepage.model.weights import seeded_weights
from forepage.settings import ModelSettings, WeightDtype
from forepage.worker.assembly import ModelFolder
from rigs.held_weights import (
    CPU,
    DTYPES,
    QUANTISED,
    SMOOTH,
    assert_differ_by_bf16_roundings,
    load,
    logits,
    official_folder,
)

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
OVERHEAD_BYTES = 64 << 20
"""Memory a start may take beside what it leaves; the promise is 1 GiB."""
MEASURE = """
import ctypes, json, sys, torch
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
peak = status("VmHWM") - before
ctypes.CDLL(None).malloc_trim(0)  # what is free again, and the allocator keeps, is not left
left = status("VmRSS") - before
device.copies.close()
print(json.dumps({"pools": pools, "left": left, "peak": peak}), file=sys.stderr)
"""


def test_bf16_logits_differ_from_fp32_ones_by_its_roundings(tmp_path: Path) -> None:
    folder = official_folder(tmp_path, SMOOTH)
    wide, narrow = (logits(folder, dtype) for dtype in (WeightDtype.FP32, WeightDtype.BF16))
    assert_differ_by_bf16_roundings(narrow, wide, SMOOTH)


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
        for announced, weights in (
            (loaded, load(folder, spec, dtype, rank=rank, num_ranks=num_ranks)),
            (
                seeded,
                seeded_weights(spec, 1, dtype=DTYPES[dtype], device=CPU, rank=rank, num_ranks=num_ranks),
            ),
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
    assert measured["left"] > 0.95 * held  # pages that the kernel took back meanwhile are not in it
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
