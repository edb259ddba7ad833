"""Seeded weights are the same everywhere; loaded ones are checked tensor by tensor."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import forepage.model
from forepage.errors import ModelFormatError
from forepage.model.spec import ModelSpec, read_config
from forepage.model.weight_table import Role, weight_table
from forepage.model.weights import load_or_seed, seeded_weights

CPU = torch.device("cpu")
FOLDER = Path(forepage.model.__file__).parent / "bundled" / "seeded"
SPEC = ModelSpec.from_config(read_config(FOLDER))
SEEDED_SHA256 = "0b4ff4bb24cd1a6914125c666273c4933d337c89909310aef77d54e0724e1d74"
"""Of the bundled model's weights in name order. A change here changes every token the seeded model says."""


def seeded(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The bundled model's weights, each in storage of its own as a file wants them."""
    weights = seeded_weights(SPEC, 0, dtype=dtype, device=CPU)
    return {name: tensor.clone() for name, tensor in weights.items()}


def load(folder: Path, spec: ModelSpec = SPEC) -> dict[str, Tensor]:
    """The folder's weights as fp32."""
    return load_or_seed(folder, spec, dtype=torch.float32, device=CPU)


def test_seeded_weights_are_the_same_bits_on_every_machine() -> None:
    digest = hashlib.sha256()
    for name, tensor in sorted(seeded().items()):
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    assert digest.hexdigest() == SEEDED_SHA256


def test_seeded_weights_match_the_table_and_are_nowhere_zero() -> None:
    weights = seeded()
    table = weight_table(SPEC)
    assert weights.keys() == table.keys()
    for name, entry in table.items():
        assert tuple(weights[name].shape) == entry.shape
        assert weights[name].dtype == (torch.int64 if entry.role is Role.EXPERT_IDS else torch.float32)
        if entry.role is not Role.EXPERT_IDS:
            assert (weights[name] != 0).float().mean() > 0.99, name


def test_hash_routing_gives_every_token_distinct_experts() -> None:
    experts = seeded()["layers.0.ffn.gate.tid2eid"]
    assert experts.min() == 0
    assert experts.max() == SPEC.num_experts - 1
    assert (experts[:, 0] != experts[:, 1]).all()


def test_another_seed_gives_other_weights() -> None:
    other = seeded_weights(SPEC, 1, dtype=torch.float32, device=CPU)
    assert not torch.equal(seeded()["embed.weight"], other["embed.weight"])


def test_model_dtype_leaves_what_is_computed_in_fp32() -> None:
    weights = seeded(torch.bfloat16)
    matrices = ("embed", "layers.2.attn.wq_a", "layers.2.attn.indexer.weights_proj")
    as_a_release_stores_them = ("head", "layers.3.ffn.gate", "layers.2.attn.compressor.wkv")
    for name in (*matrices, *as_a_release_stores_them):
        assert weights[f"{name}.weight"].dtype == torch.bfloat16
    fp32 = ("norm.weight", "hc_head_fn", "layers.3.ffn.gate.bias", "layers.2.attn.compressor.ape")
    for name in (*fp32, "layers.2.attn.attn_sink", "layers.2.attn.kv_norm.weight"):
        assert weights[name].dtype == torch.float32, name
    assert weights["layers.0.ffn.gate.tid2eid"].dtype == torch.int64


def test_flash_tensors_have_the_published_names_and_shapes() -> None:
    spec = ModelSpec.from_config(
        {
            **read_config(FOLDER),
            "hidden_size": 4096,
            "num_hidden_layers": 43,
            "num_attention_heads": 64,
            "head_dim": 512,
            "q_lora_rank": 1024,
            "o_groups": 8,
            "o_lora_rank": 1024,
            "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
            "index_n_heads": 64,
            "n_routed_experts": 256,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 2048,
        }
    )
    table = weight_table(spec)
    shapes = {
        "layers.2.attn.wq_b.weight": (32768, 1024),
        "layers.2.attn.wo_a.weight": (8192, 4096),
        "layers.2.attn.wo_b.weight": (4096, 8192),
        "layers.2.attn.compressor.wkv.weight": (1024, 4096),
        "layers.2.attn.compressor.ape": (4, 1024),
        "layers.3.attn.compressor.wgate.weight": (512, 4096),
        "layers.3.attn.compressor.ape": (128, 512),
        "layers.2.attn.indexer.wq_b.weight": (8192, 1024),
        "layers.2.attn.indexer.compressor.wkv.weight": (256, 4096),
        "layers.42.ffn.experts.255.w2.weight": (4096, 2048),
        "layers.0.hc_attn_fn": (24, 16384),
        "hc_head_fn": (4, 16384),
    }
    assert {name: table[name].shape for name in shapes} == shapes
    assert "layers.3.attn.indexer.wq_b.weight" not in table
    assert "layers.2.ffn.gate.bias" not in table
    assert "layers.3.ffn.gate.tid2eid" not in table


def test_bundled_folder_is_seeded() -> None:
    assert torch.equal(load(FOLDER)["head.weight"], seeded()["head.weight"])


def test_folder_without_weights_or_seed_names_the_seed_field(tmp_path: Path) -> None:
    config = {key: value for key, value in read_config(FOLDER).items() if key != "forepage_seed"}
    with pytest.raises(ModelFormatError, match="forepage_seed"):
        load(tmp_path, ModelSpec.from_config(config))


def test_saved_weights_load_to_the_same_bits_from_several_files(tmp_path: Path) -> None:
    weights = seeded()
    names = sorted(weights)
    save_file({name: weights[name] for name in names[::2]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({name: weights[name] for name in names[1::2]}, tmp_path / "model-00002-of-00002.safetensors")
    loaded = load(tmp_path)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in names)


def test_bf16_checkpoint_is_upcast(tmp_path: Path) -> None:
    weights = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in seeded().items()
    }
    save_file(weights, tmp_path / "model.safetensors")
    loaded = load(tmp_path)
    assert loaded["head.weight"].dtype == torch.float32
    assert torch.equal(loaded["head.weight"], weights["head.weight"].float())


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("norm.weight", None, "norm.weight"),
        ("model.norm.weight", torch.ones(128), "norm.weight is under two names"),
        ("extra.weight", torch.ones(128), "unexpected tensor extra.weight"),
        ("mtp.0.norm.weight", torch.ones(128), "unexpected tensor mtp.0.norm.weight"),
        ("norm.weight", torch.ones(64), r"norm.weight has shape \(64,\)"),
        ("head.weight", torch.zeros(320, 128, dtype=torch.int64), "head.weight has dtype I64"),
        ("head.weight", torch.zeros(320, 128, dtype=torch.float8_e4m3fn), "head.weight has dtype F8_E4M3"),
        (
            "layers.0.ffn.experts.0.w1.weight",
            torch.zeros(64, 64, dtype=torch.int8),
            "1 tensors are missing, first layers.0.ffn.experts.0.w1.scale",
        ),
    ],
)
def test_wrong_tensor_is_named(tmp_path: Path, name: str, tensor: Tensor | None, message: str) -> None:
    weights = seeded()
    if tensor is None:
        del weights[name]
    else:
        weights[name] = tensor
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelFormatError, match=message):
        load(tmp_path)


def test_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    save_file(seeded(), tmp_path / "a.safetensors")
    save_file({"norm.weight": torch.ones(128)}, tmp_path / "b.safetensors")
    with pytest.raises(ModelFormatError, match=r"norm\.weight is in another file"):
        load(tmp_path)


def test_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header")
    with pytest.raises(ModelFormatError, match=r"model\.safetensors"):
        load(tmp_path)


def test_drafter_tensors_announced_by_the_config_are_skipped(tmp_path: Path) -> None:
    spec = ModelSpec.from_config({**read_config(FOLDER), "num_nextn_predict_layers": 1})
    save_file({**seeded(), "mtp.0.norm.weight": torch.ones(128)}, tmp_path / "model.safetensors")
    assert "mtp.0.norm.weight" not in load(tmp_path, spec)
