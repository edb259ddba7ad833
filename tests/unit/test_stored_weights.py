"""FP8 and MXFP4 weights held as stored: the same bytes, and the same model as their dequantised values."""

from pathlib import Path

import pytest
import torch

from forepage.errors import ModelFormatError
from forepage.model.spec import ModelSpec
from forepage.model.stored_form import Form
from forepage.model.tensor_parallel import rank_spans
from forepage.settings import WeightDtype
from rigs.checkpoint_writer import stored_tensors, write_checkpoint
from rigs.held_weights import (
    ALIGNED,
    FEW_CHOSEN,
    NUM_TOKENS,
    QUANTISED,
    SMOOTH,
    assert_differ_by_bf16_roundings,
    load,
    logits,
    official_folder,
)
from rigs.parity import ATOL
from rigs.parity_oracle import read_by_oracle, run_built
from rigs.ranks import on_ranks


@pytest.mark.parametrize("config", [SMOOTH, ALIGNED, FEW_CHOSEN], ids=["cut", "aligned", "few"])
def test_stored_weights_mean_what_their_dequantised_ones_do(
    tmp_path: Path, config: dict[str, object]
) -> None:
    """Only the order of sums differs, on one rank and on two."""
    folder = official_folder(tmp_path, config)
    expected = logits(folder, WeightDtype.FP32, config)
    found = [logits(folder, WeightDtype.STORED, config)]
    found += on_ranks(2, lambda ranks: logits(folder, WeightDtype.STORED, config, ranks=ranks))
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


def test_a_compressor_stored_in_two_dtypes_is_refused_in_bf16(tmp_path: Path) -> None:
    stored, spec = stored_tensors(QUANTISED), ModelSpec.from_config(QUANTISED)
    name = "layers.2.attn.compressor.wgate.weight"
    stored[name] = stored[name].float()
    write_checkpoint(tmp_path, QUANTISED, stored)
    with pytest.raises(ModelFormatError, match=rf"{name} is stored in another form .* to fp32$"):
        load(tmp_path, spec, WeightDtype.BF16)
    load(tmp_path, spec, WeightDtype.FP32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [WeightDtype.STORED, WeightDtype.BF16])
def test_kernels_give_the_models_logits_but_for_bf16_roundings(tmp_path: Path, dtype: WeightDtype) -> None:
    config = ALIGNED | {"hidden_size": 512, "moe_intermediate_size": 256, "q_lora_rank": 128}
    folder, device = official_folder(tmp_path, config), torch.device("cuda", 0)
    wide = logits(folder, WeightDtype.FP32, config)
    assert_differ_by_bf16_roundings(logits(folder, dtype, config, device=device), wide, config)
