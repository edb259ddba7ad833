"""What a model config must say, and what is refused by which name."""

import json
from pathlib import Path

import pytest

import forepage.model
from forepage.errors import ModelFormatError
from forepage.kv.geometry import KvFormat, KvGeometry
from forepage.model.spec import ModelSpec, read_config

SEEDED = read_config(Path(forepage.model.__file__).parent / "bundled" / "seeded")
FLASH = {
    **SEEDED,
    "vocab_size": 129280,
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "head_dim": 512,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "index_n_heads": 64,
    "index_topk": 512,
    "n_routed_experts": 256,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 2048,
    "num_nextn_predict_layers": 1,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
PRO = {
    **FLASH,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
    "index_topk": 1024,
    "n_routed_experts": 384,
    "moe_intermediate_size": 3072,
    "routed_scaling_factor": 2.5,
}


def without(name: str) -> dict[str, object]:
    """The seeded config less one field."""
    return {key: value for key, value in SEEDED.items() if key != name}


def test_flash_has_21_c4_and_20_c128_layers() -> None:
    spec = ModelSpec.from_config(FLASH)
    assert spec.c4_layers == tuple(range(2, 43, 2))
    assert spec.c128_layers == tuple(range(3, 42, 2))
    assert spec.seed == 0
    assert spec.yarn.factor == 16


def test_pro_has_30_c4_and_31_c128_layers() -> None:
    spec = ModelSpec.from_config(PRO)
    assert len(spec.c4_layers) == 30
    assert spec.c128_layers[:3] == (0, 1, 3)
    assert len(spec.c128_layers) == 31


@pytest.mark.parametrize("config", [SEEDED, FLASH, PRO], ids=["seeded", "flash", "pro"])
def test_spec_and_geometry_name_the_same_layers(config: dict[str, object]) -> None:
    spec = ModelSpec.from_config(config)
    geometry = KvGeometry.from_config(config, KvFormat.FP8)
    assert (spec.c4_layers, spec.c128_layers) == (geometry.c4_layers, geometry.c128_layers)


@pytest.mark.parametrize(
    "name",
    sorted(
        name
        for name in SEEDED
        if not name.startswith("forepage_") and name not in {"architectures", "bos_token_id", "eos_token_id"}
    ),
)
def test_missing_field_is_named(name: str) -> None:
    with pytest.raises(ModelFormatError, match=name):
        ModelSpec.from_config(without(name))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "deepseek_v41"),
        ("model_type", "deepseek_v3"),
        ("dspark_num_stages", 3),
        ("scoring_func", "sigmoid"),
        ("topk_method", "greedy"),
        ("norm_topk_prob", False),
        ("num_key_value_heads", 2),
        ("n_shared_experts", 2),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("tie_word_embeddings", True),
        ("rope_scaling", None),
        ("rope_scaling", {"type": "linear", "factor": 2}),
        ("compress_ratios", [0, 0, 4, 128, 4, 128, 1, 0]),
        ("compress_ratios", [0, 0]),
        ("compress_ratios", [0, 0, 4, 128, 4, 128, [4], 0]),
        ("vocab_size", "320"),
        ("hidden_size", 0),
        ("num_hidden_layers", True),
        ("rope_theta", -1),
        ("swiglu_limit", None),
        ("qk_rope_head_dim", 63),
        ("qk_rope_head_dim", 128),
        ("index_head_dim", 96),
        ("index_head_dim", 32),
        ("o_groups", 3),
        ("num_experts_per_tok", 5),
        ("forepage_seed", "zero"),
    ],
)
def test_unsupported_value_is_named(name: str, value: object) -> None:
    with pytest.raises(ModelFormatError, match=name):
        ModelSpec.from_config({**SEEDED, name: value})


@pytest.mark.parametrize("name", ["factor", "original_max_position_embeddings", "beta_fast", "beta_slow"])
def test_missing_yarn_field_is_named(name: str) -> None:
    scaling = SEEDED["rope_scaling"]
    assert isinstance(scaling, dict)
    less = {key: value for key, value in scaling.items() if key != name}
    with pytest.raises(ModelFormatError, match=rf"rope_scaling\.{name}"):
        ModelSpec.from_config({**SEEDED, "rope_scaling": less})


def test_rope_type_is_the_newer_name_of_the_scaling_type() -> None:
    scaling = SEEDED["rope_scaling"]
    assert isinstance(scaling, dict)
    renamed = {"rope_type" if key == "type" else key: value for key, value in scaling.items()}
    assert ModelSpec.from_config({**SEEDED, "rope_scaling": renamed}) == ModelSpec.from_config(SEEDED)


def test_a_config_without_a_seed_has_none() -> None:
    assert ModelSpec.from_config(without("forepage_seed")).seed is None


@pytest.mark.parametrize("text", [None, "{", "[1]"], ids=["absent", "cut off", "no object"])
def test_unreadable_config_names_the_file(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelFormatError, match=r"config\.json"):
        read_config(tmp_path)


def test_config_is_read_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FLASH))
    assert read_config(tmp_path) == FLASH
