"""`forepage check MODEL_DIR`: the published figures of Flash, the folder's own, and refusals in one line."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from typer.testing import CliRunner

from forepage import __main__ as cli
from forepage.kv.budget import budget_for
from forepage.kv.geometry import KeyFormat, KvFormat, KvGeometry
from forepage.model.footprint import held_bytes, kv_cost, rank_bytes, sequence_footprint
from forepage.model.held_form import HeldForm
from forepage.model.spec import ModelSpec
from forepage.model.stored_form import StoredTensor, announced_tensors
from forepage.model.tensor_parallel import can_split
from forepage.settings import SEEDED_MODEL, ResidencyMode, WeightDtype, WorkerSettings
from forepage.worker.parts import WorkerParts
from forepage.worker.quota import prefill_quota, steady_quota
from rigs.checkpoint_writer import stored_tensors, write_checkpoint
from rigs.parity_configs import MIXED
from rigs.v4_tokenizer import v4_folder

FLASH: dict[str, object] = {
    **MIXED,
    "vocab_size": 129280,
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "n_routed_experts": 256,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 2048,
    "num_nextn_predict_layers": 1,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "expert_dtype": "fp4",
}
SMALL: dict[str, object] = {
    **MIXED,
    "num_nextn_predict_layers": 1,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
GIB = 1 << 30


@pytest.fixture(scope="module")
def flash() -> dict[str, StoredTensor]:
    """Flash's tensors by its config."""
    return announced_tensors(ModelSpec.from_config(FLASH), FLASH)


def config_folder(path: Path, config: Mapping[str, object]) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    return path


def check(*arguments: str) -> tuple[int, list[str]]:
    result = CliRunner().invoke(cli.app, ["check", *arguments], catch_exceptions=False)
    return result.exit_code, result.output.splitlines()


def row(lines: list[str], *start: str) -> list[str]:
    """The cells after `start` of the only line that begins with it."""
    [found] = [line.split() for line in lines if line.split()[: len(start)] == list(start)]
    return found[len(start) :]


def test_flash_has_the_published_tensors_and_bytes(flash: dict[str, StoredTensor]) -> None:
    assert len(flash) == 69_187
    assert sum(tensor.num_bytes for tensor in flash.values()) == 159_609_485_896
    assert sum(name.startswith("mtp.") for name in flash) == 1_575
    published = {
        "layers.0.attn.wq_a.scale": ("F8_E8M0", (8, 32)),
        "layers.2.attn.indexer.wq_b.weight": ("F8_E4M3", (8192, 1024)),
        "layers.42.ffn.experts.255.w2.weight": ("I8", (4096, 1024)),
        "layers.42.ffn.experts.255.w2.scale": ("F8_E8M0", (4096, 64)),
        "layers.2.ffn.gate.tid2eid": ("I64", (129280, 6)),
        "mtp.0.e_proj.scale": ("F8_E8M0", (32, 32)),
    }
    assert {name: (flash[name].dtype, flash[name].shape) for name in published} == published


def test_first_flash_release_names_no_expert_dtype(flash: dict[str, StoredTensor]) -> None:
    config = {key: value for key, value in FLASH.items() if key != "expert_dtype"}
    assert announced_tensors(ModelSpec.from_config(config), config) == flash


@pytest.mark.parametrize(
    ("tokens", "fp8", "mxfp4"),
    [
        (1 << 16, (200_933_376, 45_416_448, 5_980_160, 255_544_320), 233_524_224),
        (1 << 18, (803_733_504, 181_665_792, 23_920_640, 1_012_534_272), 924_453_888),
        (1 << 19, (1_607_467_008, 363_331_584, 47_841_280, 2_021_854_208), 1_845_693_440),
        (1 << 20, (3_214_934_016, 726_663_168, 95_682_560, 4_040_494_080), 3_688_172_544),
    ],
)
def test_flash_kv_costs_what_is_published(tokens: int, fp8: tuple[int, ...], mxfp4: int) -> None:
    cost = kv_cost(KvGeometry.from_config(FLASH, KvFormat.FP8), tokens)
    assert (cost.rows, cost.keys, cost.c128, cost.total) == fp8
    assert cost.window == 3_214_336
    assert kv_cost(KvGeometry.from_config(FLASH, KvFormat.FP8, KeyFormat.MXFP4), tokens).total == mxfp4


def test_ranks_share_what_can_be_shared(flash: dict[str, StoredTensor]) -> None:
    spec = ModelSpec.from_config(FLASH)
    one, eight = rank_bytes(spec, flash, 1), rank_bytes(spec, flash, 8)
    assert one == sum(tensor.num_bytes for name, tensor in flash.items() if not name.startswith("mtp."))
    shared = ("experts.", "attn.wq_b.", "attn.wo_a.", "attn.wo_b.", "attn.attn_sink")
    split = sum(
        tensor.num_bytes
        for name, tensor in flash.items()
        if name.startswith("layers.")
        and any(mark in name for mark in shared)
        and "shared_experts" not in name
        and "indexer" not in name
    )
    assert one - eight == split * 7 // 8
    assert not can_split(spec, 3)
    assert not can_split(spec, 16)


@pytest.mark.parametrize("mode", list(ResidencyMode))
@pytest.mark.parametrize("tokens", [1 << 14, 1 << 16, 1 << 20])
def test_footprint_is_what_the_worker_promises(mode: ResidencyMode, tokens: int) -> None:
    settings, topk = WorkerSettings(), 512
    geometry = KvGeometry.from_config(FLASH, KvFormat.FP8)
    blocks = SimpleNamespace(staging_blocks=topk // 64)
    parts: Any = SimpleNamespace(settings=settings, geometry=geometry, topk=topk, blocks=blocks)
    parts.recent_blocks = cast(Any, WorkerParts.recent_blocks).fget(parts)
    parts.resume_parts = cast(Any, WorkerParts.resume_parts).fget(parts)
    sequence: Any = SimpleNamespace(
        request=SimpleNamespace(prompt=[0] * tokens, total_tokens=tokens, mode=mode),
        guard=SimpleNamespace(budget_blocks=budget_for(geometry.num_blocks(tokens))),
        is_exact=mode is ResidencyMode.EXACT,
        is_full_by_room=False,
    )
    footprint = sequence_footprint(geometry, settings, mode, num_tokens=tokens, topk=topk)
    for quota, held in (
        (prefill_quota(parts, sequence), footprint.prefill),
        (steady_quota(parts, sequence), footprint.decode),
    ):
        assert held == geometry.kv_bytes(num_tokens=tokens, row_blocks=quota.rows, key_blocks=quota.keys)
    points = tokens // settings.resume_every_tokens + 2
    assert footprint.host == (geometry.num_blocks(tokens) + points * parts.resume_parts) * geometry.slot_bytes


def test_check_of_a_config_prints_flash(tmp_path: Path) -> None:
    code, lines = check(str(config_folder(tmp_path, FLASH)), "--host-bytes", str(2048 * GIB), "--ranks", "4")
    assert code == 0
    assert "no weight files here" in lines[0]
    assert row(lines, "in", "the", "folder")[0] == "69,187"
    assert row(lines, "in", "the", "folder")[-1] == "159,609,485,896"
    assert row(lines, "loaded")[-1] == "156,015,698,140"
    stored, stored_size, _, _, _, held = row(lines, "4")[:6]
    assert (stored, stored_size) == ("42,391,796,380", "(39.48")
    held_by_file = held_bytes(
        ModelSpec.from_config(FLASH),
        4,
        HeldForm.of(WeightDtype.STORED),
        announced_tensors(ModelSpec.from_config(FLASH), FLASH),
    )
    assert held == f"{held_by_file:,}" == "42,392,688,540"
    for fp8, mxfp4 in [[line.split() for line in lines if line.startswith("1M ")]]:
        assert fp8[1:6] == ["3,214,934,016", "726,663,168", "95,682,560", "3,214,336", "4,040,494,080"]
        assert mxfp4[5] == "3,688,172,544"
    geometry = KvGeometry.from_config(FLASH, KvFormat.FP8)
    free, one = 80 * GIB - 42_392_688_540, 4096 * (geometry.rows_bytes + geometry.keys_bytes)
    fixed = geometry.fixed_bytes(1 << 20)
    full = [line.split() for line in lines if line.split()[:2] == ["fp8", "full"]]
    assert int(full[1][-1]) == free // (one + fixed) == 10
    assert int(full[2][-1]) == 2048 * GIB // ((4096 + 66 * 4) * geometry.slot_bytes)
    assert len([line for line in lines if "lookahead, guarded" in line]) == 6


def test_flash_as_stored_takes_little_more_than_its_files(flash: dict[str, StoredTensor]) -> None:
    """The rest is the norms, which are held in fp32 and bf16 in the files."""
    spec, form = ModelSpec.from_config(FLASH), HeldForm.of(WeightDtype.STORED)
    for num_ranks in (1, 2, 4, 8):
        in_files = rank_bytes(spec, flash, num_ranks)
        assert held_bytes(spec, num_ranks, form, flash) - in_files == 892_160
    assert held_bytes(spec, 1, form, flash) < 1.0001 * rank_bytes(spec, flash, 1)


def test_check_counts_weights_as_the_worker_will_hold_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, spec = str(config_folder(tmp_path, SMALL)), ModelSpec.from_config(SMALL)
    stored = announced_tensors(spec, SMALL)

    def held(dtype: WeightDtype, device: str) -> str:
        return f"{held_bytes(spec, 1, HeldForm.of(dtype, device), stored):,}"

    for dtype_set, device_set, dtype in (
        ("fp32", "auto", WeightDtype.FP32),
        ("bf16", "auto", WeightDtype.BF16),
        ("stored", "auto", WeightDtype.STORED),
        ("stored", "cpu", WeightDtype.STORED),
        ("auto", "cpu", WeightDtype.FP32),
        ("auto", "cuda:1", WeightDtype.STORED),
    ):
        with monkeypatch.context() as patch:
            patch.setenv("FOREPAGE_MODEL__WEIGHT_DTYPE", dtype_set)
            patch.setenv("FOREPAGE_MODEL__DEVICE", device_set)
            _, lines = check(folder)
        assert held(dtype, device_set) in row(lines, "1")
        assert any(line.endswith(f"weights held as {dtype}") for line in lines)


def test_check_counts_what_lies_in_the_folder(tmp_path: Path) -> None:
    stored = stored_tensors(SMALL)
    write_checkpoint(tmp_path, SMALL, stored)
    code, lines = check(str(tmp_path))
    assert code == 0
    assert "3 weight files" in lines[0]
    in_folder = row(lines, "in", "the", "folder")
    assert in_folder[0] == f"{len(stored):,}"
    assert in_folder[-1] == f"{sum(tensor.nbytes for tensor in stored.values()):,}"
    loaded = sum(tensor.nbytes for name, tensor in stored.items() if not name.startswith("mtp."))
    assert row(lines, "1")[0] == f"{loaded:,}"
    assert row(lines, "4")[0] == "-"


def test_check_is_plain_text_when_it_is_no_terminal(tmp_path: Path) -> None:
    _, lines = check(str(config_folder(tmp_path, FLASH)))
    assert all(line.isascii() for line in lines)
    assert "\x1b" not in "".join(lines)


def test_check_says_when_the_weights_fit_no_gpu(tmp_path: Path) -> None:
    code, lines = check(str(config_folder(tmp_path, FLASH)), "--gpu-bytes", str(16 * GIB))
    assert code == 0
    for form in ("as stored", "held as stored"):
        assert f"Sequences on a GPU of 16 GiB: none, weights {form} don't fit" in lines
    assert "does not fit" in " ".join(row(lines, "8"))


def test_check_of_the_bundled_model_works() -> None:
    code, lines = check(str(SEEDED_MODEL))
    assert code == 0
    assert row(lines, "loaded")[0] == "275"
    assert "tokenizer.json: 320 tokens" in lines
    assert "memory indexer: in the folder" in lines


def test_check_says_what_a_published_folder_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_folder(tmp_path, SMALL)
    lines = check(str(tmp_path))[1]
    assert "tokenizer.json: none: neither gateway nor worker start" in lines
    assert any(line.startswith("memory indexer: none: name its file in FOREPAGE_MODEL__") for line in lines)
    assert "reasoning_effort_max.txt: none: reasoning_effort max is refused" in lines
    (tmp_path / "reasoning_effort_max.txt").write_text("Try hard.")
    (tmp_path / "tokenizer.json").write_bytes((v4_folder() / "tokenizer.json").read_bytes())
    monkeypatch.setenv("FOREPAGE_MODEL__MEMORY_INDEXER", "/models/indexer.pt")
    lines = check(str(tmp_path))[1]
    assert "tokenizer.json: 129,280 tokens, the model 300" in lines
    assert "memory indexer: /models/indexer.pt (FOREPAGE_MODEL__MEMORY_INDEXER), which is not there" in lines
    assert "reasoning_effort_max.txt: in the folder" in lines
    (tmp_path / "tokenizer.json").write_text("{")
    code, [line] = check(str(tmp_path))
    assert code == 1
    assert str(tmp_path / "tokenizer.json") in line


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (FLASH | {"dspark_block_size": 5}, "dspark_block_size"),
        (FLASH | {"model_type": "deepseek_v41"}, "deepseek_v41"),
        (FLASH | {"head_dim": "512"}, "head_dim"),
    ],
)
def test_check_refuses_another_model_in_one_line(
    tmp_path: Path, config: dict[str, object], says: str
) -> None:
    code, lines = check(str(config_folder(tmp_path, config)))
    assert code == 1
    [line] = lines
    assert line.startswith("forepage check: ")
    assert says in line


def test_check_refuses_ranks_that_do_not_divide(tmp_path: Path) -> None:
    code, [line] = check(str(config_folder(tmp_path, FLASH)), "--ranks", "3")
    assert code == 1
    assert line.endswith("can't be split into 3 ranks, only 1, 2, 4, 8")


def test_check_names_a_damaged_shard(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SMALL, stored_tensors(SMALL))
    path = tmp_path / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    code, [line] = check(str(tmp_path))
    assert code == 1
    assert f"{path}: truncated in " in line


def test_check_of_no_folder_is_one_line(tmp_path: Path) -> None:
    code, [line] = check(str(tmp_path / "absent"))
    assert code == 1
    assert "config.json" in line
