"""The memory indexer's query side against an independent numpy forward, and its files."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

from forepage.errors import ModelFormatError, RequestError
from forepage.kv.geometry import KvFormat
from forepage.model.memory_indexer import (
    IndexerCalibration,
    MemoryIndexer,
    read_indexer_config,
    seeded_tensors,
)
from forepage.model.spec import ModelSpec, read_config
from forepage.settings import SEEDED_MODEL

F32 = npt.NDArray[np.float32]
CPU = torch.device("cpu")
SPEC = ModelSpec.from_config(read_config(SEEDED_MODEL))
CONFIG = read_indexer_config(SEEDED_MODEL, SPEC)
TENSORS = seeded_tensors(SPEC, CONFIG)
CALIBRATION = {"budget_blocks": 64, "interval_steps": 64, "recent_tokens": 2048, "evidence_recall": 0.97}


def bf16(x: F32) -> F32:
    """Round to nearest even on the upper 16 bits."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def yarn_frequencies() -> F32:
    """theta 160000, factor 16, ramp 15..25 of 32 pairs; every operation in fp32.

    The power is torch's: numpy's is one ulp off for some pairs, a visible angle at a million tokens.
    """
    pairs = np.arange(32, dtype=np.float32)
    power: F32 = torch.pow(160_000.0, torch.from_numpy(pairs * np.float32(2) / np.float32(64))).numpy()
    base = np.float32(1) / power
    ramp = np.clip((pairs - np.float32(15)) / np.float32(10), 0, 1)
    mixed: F32 = base / np.float32(16) * ramp + base * (np.float32(1) - ramp)
    return mixed


def rope(q: F32, position: int) -> F32:
    """Complex rotation of pairs (2i, 2i + 1) of the last 64 dims."""
    angle = np.float32(position) * yarn_frequencies()
    pairs = q[:, 64:].astype(np.float64).reshape(-1, 32, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle.astype(np.float64))
    flat = np.stack((turned.real, turned.imag), axis=-1).reshape(-1, 64)
    return np.concatenate((q[:, :64], flat.astype(np.float32)), axis=1)


def hadamard_matrix(dims: int) -> F32:
    """Sylvester: entry (i, j) is -1 to the number of bits that i and j share."""
    signs = [[(-1.0) ** bin(i & j).count("1") for j in range(dims)] for i in range(dims)]
    return np.asarray(signs, dtype=np.float32) / np.float32(np.sqrt(dims))


def oracle(hidden: F32, position: int, *, rotated: bool) -> tuple[F32, F32]:
    queries, weights = [], []
    for x, layer in zip(hidden, CONFIG.target_layers, strict=True):
        w = {
            name: TENSORS[f"retrievers.l{layer}.{name}"].numpy().astype(np.float64)
            for name in ("wq_a.weight", "q_norm_weight", "wq_b.weight", "weights_proj.weight")
        }
        latent = x.astype(np.float64) @ w["wq_a.weight"].T
        latent = latent / np.sqrt((latent**2).mean() + 1e-6) * w["q_norm_weight"]
        heads = w["weights_proj.weight"].shape[0]
        q = bf16((latent @ w["wq_b.weight"].T).astype(np.float32).reshape(heads, 128))
        q = bf16(rope(q, position))
        queries.append(q @ hadamard_matrix(128) if rotated else q)
        weights.append((x @ w["weights_proj.weight"].T) * 128**-0.5 * heads**-0.5)
    return np.stack(queries), np.stack(weights).astype(np.float32)


def indexer(kv_format: KvFormat = KvFormat.FP8) -> MemoryIndexer:
    return MemoryIndexer.load(SEEDED_MODEL, SPEC, kv_format, CPU)


def hidden_states(seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(CONFIG.target_layers), SPEC.hidden_size, generator=generator)


@pytest.mark.parametrize("position", [0, 37, 131_071, 524_287, 1_048_575])
@pytest.mark.parametrize("kv_format", list(KvFormat))
def test_queries_match_numpy_forward(position: int, kv_format: KvFormat) -> None:
    hidden = hidden_states()
    q, weights = indexer(kv_format).queries(hidden, position)
    want_q, want_weights = oracle(hidden.numpy(), position, rotated=kv_format is KvFormat.FP8)
    assert q.shape == (3, 8, 128)
    np.testing.assert_allclose(weights.numpy(), want_weights, atol=2e-6)
    # A value that falls between two bf16 numbers may round either way when the sum's order differs.
    diff = np.abs(q.numpy() - want_q)
    assert diff.mean() < 1e-4
    assert diff.max() < 0.02


def test_scores_match_numpy_forward_through_stored_keys() -> None:
    hidden, position = hidden_states(5), 70_001
    keys = torch.randn(500, 128, generator=torch.Generator().manual_seed(9)).numpy()
    q, weights = indexer(KvFormat.FP8).queries(hidden, position)
    plain_q, plain_weights = oracle(hidden.numpy(), position, rotated=False)
    rotated_keys = keys @ hadamard_matrix(128)
    for layer in range(3):
        logits = np.maximum(rotated_keys @ q[layer].numpy().T, 0) @ weights[layer].numpy()
        want = np.maximum(keys @ plain_q[layer].T, 0) @ plain_weights[layer]
        np.testing.assert_allclose(logits, want, atol=1e-3)  # rotating both sides changes nothing


def test_queries_refuse_a_position_past_the_model() -> None:
    with pytest.raises(RequestError, match=r"position: 1048576 is outside the model's 0..1048575"):
        indexer().queries(hidden_states(), SPEC.max_position)
    with pytest.raises(RequestError, match="position"):
        indexer().queries(hidden_states(), -1)


def test_queries_refuse_wrong_shape_and_nan() -> None:
    with pytest.raises(RequestError, match="hidden: shape"):
        indexer().queries(torch.zeros(2, SPEC.hidden_size), 0)
    bad = hidden_states()
    bad[1, 7] = float("nan")
    with pytest.raises(RequestError, match="hidden: holds values that are not finite"):
        indexer().queries(bad, 0)


def test_seeded_tensors_have_released_names_and_shapes() -> None:
    assert {name: tuple(tensor.shape) for name, tensor in TENSORS.items() if ".l2." in name} == {
        "retrievers.l2.wq_a.weight": (64, 128),
        "retrievers.l2.q_norm_weight": (64,),
        "retrievers.l2.wq_b.weight": (8 * 128, 64),
        "retrievers.l2.weights_proj.weight": (8, 128),
    }


def model_folder(
    folder: Path, tensors: dict[str, torch.Tensor] | None = None, changes: dict[str, object] | None = None
) -> Path:
    """A folder with memory_indexer.json (a change to None leaves a field out) and, if given, tensors."""
    body: dict[str, object] = {"target_layers": [0, 1, 2], "threshold": 0.5, **(changes or {})}
    text = json.dumps({name: value for name, value in body.items() if value is not None})
    (folder / "memory_indexer.json").write_text(text, encoding="utf-8")
    if tensors is not None:
        save_file(tensors, folder / "memory_indexer.safetensors")
    return folder


def test_load_infers_sizes_from_the_tensors(tmp_path: Path) -> None:
    tables = {f"retrievers.l{layer}.freqs_cis": torch.zeros(16, 32) for layer in range(3)}
    tensors = {**TENSORS, **tables}
    loaded = MemoryIndexer.load(model_folder(tmp_path, tensors), SPEC, KvFormat.FP8, CPU)
    assert loaded.heads == 8
    got, want = loaded.queries(hidden_states(), 11), indexer().queries(hidden_states(), 11)
    # Not bitwise: the file's tensors lie at other alignments, and sums go in another order.
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0.02)
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=2e-6)


def test_load_refuses_a_missing_tensor(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != "retrievers.l1.q_norm_weight"}
    with pytest.raises(ModelFormatError, match=r"retrievers\.l1\.q_norm_weight is missing"):
        MemoryIndexer.load(model_folder(tmp_path, tensors), SPEC, KvFormat.FP8, CPU)


def test_load_refuses_an_unexpected_tensor(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, TENSORS, {"target_layers": [0, 1]})
    with pytest.raises(ModelFormatError, match=r"unexpected tensor retrievers\.l2"):
        MemoryIndexer.load(folder, SPEC, KvFormat.FP8, CPU)


@pytest.mark.parametrize("name", ["wq_a.weight", "q_norm_weight", "wq_b.weight", "weights_proj.weight"])
def test_load_refuses_a_wrong_shape(tmp_path: Path, name: str) -> None:
    full = f"retrievers.l1.{name}"
    tensors = {**TENSORS, full: TENSORS[full][..., :-1].contiguous()}
    with pytest.raises(ModelFormatError, match="has shape"):
        MemoryIndexer.load(model_folder(tmp_path, tensors), SPEC, KvFormat.FP8, CPU)


@pytest.mark.parametrize("name", ["wq_a.weight", "q_norm_weight", "wq_b.weight", "weights_proj.weight"])
def test_load_refuses_a_tensor_without_dimensions(tmp_path: Path, name: str) -> None:
    tensors = {**TENSORS, f"retrievers.l1.{name}": torch.ones(())}
    with pytest.raises(ModelFormatError, match="has shape"):
        MemoryIndexer.load(model_folder(tmp_path, tensors), SPEC, KvFormat.FP8, CPU)


def test_load_refuses_heads_other_than_the_config_says(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="heads"):
        MemoryIndexer.load(model_folder(tmp_path, TENSORS, {"heads": 16}), SPEC, KvFormat.FP8, CPU)


def test_load_refuses_quantised_tensors(tmp_path: Path) -> None:
    name = "retrievers.l0.wq_a.weight"
    folder = model_folder(tmp_path, {**TENSORS, name: TENSORS[name].to(torch.float8_e4m3fn)})
    with pytest.raises(ModelFormatError, match=r"wq_a\.weight is torch\.float8_e4m3fn"):
        MemoryIndexer.load(folder, SPEC, KvFormat.FP8, CPU)


def test_load_refuses_a_damaged_file(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, TENSORS)
    path = folder / "memory_indexer.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelFormatError, match=r"memory_indexer\.safetensors: truncated"):
        MemoryIndexer.load(folder, SPEC, KvFormat.FP8, CPU)


def test_load_refuses_a_folder_with_neither_tensors_nor_seed(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"no memory_indexer\.safetensors"):
        MemoryIndexer.load(model_folder(tmp_path), SPEC, KvFormat.FP8, CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_layers": []}, "target_layers"),
        ({"target_layers": [1, 0]}, "target_layers"),
        ({"target_layers": [0, 0]}, "target_layers"),
        ({"target_layers": [3]}, "target_layers"),
        ({"target_layers": [True]}, "target_layers"),
        ({"target_layers": [[0]]}, "target_layers"),
        ({"threshold": 1.5}, "threshold"),
        ({"threshold": None}, "threshold"),
        ({"heads": 0}, "heads"),
        ({"rank": "64"}, "rank"),
        ({"seed": -1}, "seed"),
        ({"budget": 3}, "budget is not a known field"),
        ({"calibration": 3}, "calibration must have"),
        ({"calibration": {"budget_blocks": 64}}, "calibration must have"),
        ({"calibration": {**CALIBRATION, "evidence_recall": 1.5}}, r"calibration\.evidence_recall"),
        ({"calibration": {**CALIBRATION, "interval_steps": -1}}, "interval_steps"),
        ({"seed": 1}, "need seed, heads and rank"),
    ],
    ids=str,
)
def test_config_errors_name_the_field(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelFormatError, match=message):
        MemoryIndexer.load(model_folder(tmp_path, changes=changes), SPEC, KvFormat.FP8, CPU)


def test_config_says_what_it_was_calibrated_for(tmp_path: Path) -> None:
    config = read_indexer_config(model_folder(tmp_path, changes={"calibration": CALIBRATION}), SPEC)
    assert config.calibration == IndexerCalibration(64, 64, 2048, 0.97)
    assert CONFIG.calibration is None  # nobody calibrated the seeded one


def test_config_that_is_absent_or_no_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"memory_indexer\.json: no .* FOREPAGE_MODEL__MEMORY_INDEXER"):
        read_indexer_config(tmp_path, SPEC)
    (tmp_path / "memory_indexer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelFormatError, match=r"memory_indexer\.json: can't read"):
        read_indexer_config(tmp_path, SPEC)
    (tmp_path / "memory_indexer.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ModelFormatError, match="JSON object"):
        read_indexer_config(tmp_path, SPEC)
