"""Official-format checkpoints load to what their bytes mean, in parts too, and as transformers reads them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from forepage.kv.geometry import KvFormat, KvGeometry
from forepage.model.checkpoint import Checkpoint
from forepage.model.checkpoint_reader import CheckpointReader
from forepage.model.compressor import Compressor
from forepage.model.experts import PlainExperts
from forepage.model.kv_pools import KvPools, PoolCapacity, PrefillChunk
from forepage.model.moe import MixtureOfExperts
from forepage.model.quantised import QuantisedFp4, QuantisedFp8
from forepage.model.spec import ModelSpec
from forepage.model.tensor_parallel import rank_span
from forepage.model.transformer import Transformer
from forepage.model.weight_table import Split, weight_table
from forepage.model.weights import fused_names, load_or_seed, side_by_side
from rigs.checkpoint_writer import stored_tensors, write_checkpoint
from rigs.parity import ATOL
from rigs.parity_configs import MIXED
from rigs.parity_oracle import oracle_tensor, read_by_oracle, run_built, run_oracle

CPU = torch.device("cpu")
OFFICIAL: dict[str, object] = {
    **MIXED,
    "hidden_size": 160,  # no multiple of 128: the last scale of a row or column covers less
    "moe_intermediate_size": 96,
    "num_nextn_predict_layers": 1,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "expert_dtype": "fp4",
}
ALIGNED: dict[str, object] = {
    **OFFICIAL,
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "o_lora_rank": 128,
}
"""As the release is: no scale covers less than its square of a larger matrix."""
QUANTISATION_FIELDS = {"quantization_config", "expert_dtype"}
SPEC = ModelSpec.from_config(OFFICIAL)
NUM_TOKENS = 300


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    """The checkpoint's tensors as stored."""
    return stored_tensors(OFFICIAL)


@pytest.fixture(scope="module")
def folder(stored: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, written in three shards with an index."""
    path = tmp_path_factory.mktemp("official")
    write_checkpoint(path, OFFICIAL, stored)
    return path


def load(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return load_or_seed(path, SPEC, dtype=dtype, device=CPU)


def meant(name: str, stored: Mapping[str, Tensor]) -> Tensor:
    """What a tensor's bytes mean, fp32, spelled out bit by bit with numpy."""
    tensor = stored[name]
    scale_name = name.removesuffix("weight") + "scale"
    if not name.endswith("weight") or scale_name not in stored:
        return tensor
    codes = tensor.view(torch.uint8).numpy().astype(np.int64)
    powers = np.exp2(stored[scale_name].view(torch.uint8).numpy().astype(np.float64) - 127)
    if tensor.dtype == torch.int8:
        codes = np.stack((codes % 16, codes // 16), axis=-1).reshape(codes.shape[0], -1)
        magnitude = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes % 8]
        values = np.where(codes >= 8, -magnitude, magnitude)
        scales = np.repeat(powers, 32, axis=1)
    else:
        exponent, mantissa = codes // 8 % 16, codes % 8
        normal = (1 + mantissa / 8) * np.exp2(exponent - 7.0)
        magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
        values = np.where(codes >= 128, -magnitude, magnitude)
        scales = np.repeat(np.repeat(powers, 128, axis=0), 128, axis=1)
    return torch.from_numpy(values * scales[: values.shape[0], : values.shape[1]]).float()


def test_every_tensor_is_what_its_bytes_mean(folder: Path, stored: dict[str, Tensor]) -> None:
    weights = load(folder)
    assert weights.keys() == weight_table(SPEC).keys()
    assert {tensor.dtype for tensor in stored.values()} > {torch.int8, torch.float8_e4m3fn, torch.int64}
    for name, tensor in weights.items():
        assert torch.equal(tensor, meant(name, stored).to(tensor.dtype)), name


def test_bf16_loses_nothing_of_a_quantised_tensor(folder: Path, stored: dict[str, Tensor]) -> None:
    weights = load(folder, torch.bfloat16)
    for name in ("layers.2.attn.wo_b.weight", "layers.5.ffn.experts.7.w2.weight"):
        assert weights[name].dtype == torch.bfloat16
        assert torch.equal(weights[name].float(), meant(name, stored))


def test_draft_block_is_in_the_folder_and_not_loaded(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder, SPEC)
    assert "mtp.0.e_proj.scale" in checkpoint.skipped
    assert not any(name.startswith("mtp.") for name in [*checkpoint.tensors, *load(folder)])


def third_party(name: str) -> str:
    """The names that the release's converter accepts too."""
    name = name.replace("attn.wkv.scale", "attn.wkv.weight_scale_inv")
    name = name.replace("gate.bias", "gate.e_score_correction_bias")
    return "model." + name.replace(".attn.", ".self_attn.").replace(".ffn.", ".mlp.")


def test_third_party_names_load_the_same(tmp_path: Path, folder: Path, stored: dict[str, Tensor]) -> None:
    write_checkpoint(tmp_path, OFFICIAL, {third_party(name): tensor for name, tensor in stored.items()})
    same, weights = load(folder), load(tmp_path)
    assert same.keys() == weights.keys()
    assert all(torch.equal(tensor, same[name]) for name, tensor in weights.items())


def test_fp8_experts_and_no_index_load_too(tmp_path: Path) -> None:
    config = {**OFFICIAL, "expert_dtype": "fp8"}
    stored = stored_tensors(config)
    write_checkpoint(tmp_path, config, stored, num_shards=2, with_index=False)
    name = "layers.3.ffn.experts.5.w1.weight"
    assert stored[name].dtype == torch.float8_e4m3fn
    assert torch.equal(load(tmp_path)[name], meant(name, stored))


def test_stored_form_can_be_kept(folder: Path, stored: dict[str, Tensor]) -> None:
    reader = CheckpointReader(Checkpoint.open(folder, SPEC), SPEC)
    fp8 = reader.read("layers.2.attn.wq_b.weight")
    fp4 = reader.read("layers.2.ffn.experts.1.w3.weight")
    assert isinstance(fp8, QuantisedFp8)
    assert isinstance(fp4, QuantisedFp4)
    for part, name in (
        (fp8.values, "layers.2.attn.wq_b.weight"),
        (fp8.scales, "layers.2.attn.wq_b.scale"),
        (fp4.values, "layers.2.ffn.experts.1.w3.weight"),
        (fp4.scales, "layers.2.ffn.experts.1.w3.scale"),
    ):
        assert torch.equal(part.view(torch.uint8), stored[name].view(torch.uint8))


def test_ranks_parts_make_up_every_tensor(folder: Path) -> None:
    reader, whole = CheckpointReader(Checkpoint.open(folder, SPEC), SPEC), load(folder)
    for name, entry in weight_table(SPEC).items():
        covered = torch.zeros(entry.shape, dtype=torch.int64)
        for rank in range(2):
            span = rank_span(entry, SPEC, rank=rank, num_ranks=2)
            if span is None:
                continue
            place = (span.rows, span.columns)[: len(entry.shape)]
            part = torch.empty_like(whole[name][place])
            reader.read_into(part, name, rows=span.rows, columns=span.columns)
            assert torch.equal(part, whole[name][place]), name
            covered[place] += 1
        is_shared = entry.expert is None and entry.split is Split.NONE
        assert set(covered.flatten().tolist()) == {2 if is_shared else 1}, name


def test_what_the_model_fuses_already_lies_together(folder: Path) -> None:
    weights = load(folder)
    for names in fused_names(SPEC):
        tensors = [weights[name] for name in names]
        assert side_by_side(tensors).data_ptr() == tensors[0].data_ptr()
        assert torch.equal(side_by_side(tensors), torch.stack(tensors))
    scattered = [torch.rand(2, 3) for _ in range(3)]
    assert torch.equal(side_by_side(scattered), torch.stack(scattered))
    assert torch.equal(side_by_side(tensors[::-1]), torch.stack(tensors[::-1]))
    moe = MixtureOfExperts.from_weights(weights, "layers.0.ffn.", SPEC)
    names = fused_names(SPEC)[0]
    fused = side_by_side([weights[name] for name in names])
    assert isinstance(moe.experts, PlainExperts)
    assert torch.equal(moe.experts.w13, fused.view(moe.experts.w13.shape))
    assert moe.experts.w13.data_ptr() == weights[names[0]].data_ptr()
    prefix = "layers.2.attn.indexer.compressor."
    compressor = Compressor.from_weights(weights, prefix, 4, SPEC)
    both = torch.cat([weights[f"{prefix}{name}.weight"] for name in ("wkv", "wgate")])
    assert torch.equal(compressor.w_kv_gate, both)
    assert compressor.w_kv_gate.data_ptr() == weights[f"{prefix}wkv.weight"].data_ptr()


@torch.inference_mode()
def test_logits_are_those_of_the_same_weights_in_transformers(
    folder: Path, stored: dict[str, Tensor]
) -> None:
    tokens = torch.randint(SPEC.vocab_size, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0))
    loaded = logits(OFFICIAL, load(folder), tokens)
    direct = {name: meant(name, stored) for name in weight_table(SPEC)}
    direct = {name: value.float() if value.is_floating_point() else value for name, value in direct.items()}
    assert torch.equal(loaded, logits(OFFICIAL, direct, tokens))
    plain = {key: value for key, value in OFFICIAL.items() if key not in QUANTISATION_FIELDS}
    expected = run_oracle(plain, direct, tokens).logits
    assert 0.5 < expected.std() < 2
    torch.testing.assert_close(loaded, expected, atol=ATOL, rtol=0)


@torch.inference_mode()
def test_transformers_reads_the_folder_as_we_do(tmp_path: Path) -> None:
    spec, stored = ModelSpec.from_config(ALIGNED), stored_tensors(ALIGNED)
    write_checkpoint(tmp_path, ALIGNED, stored)
    oracle = read_by_oracle(tmp_path)
    direct = {name: meant(name, stored) for name in weight_table(spec)}
    theirs = oracle.state_dict()
    assert len(theirs) > 150
    for name, tensor in theirs.items():
        assert torch.equal(tensor, oracle_tensor(name, direct, spec.num_experts).to(tensor.dtype)), name
    tokens = torch.randint(spec.vocab_size, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0))
    expected = run_built(oracle, tokens).logits
    assert 0.5 < expected.std() < 2
    weights = load_or_seed(tmp_path, spec, dtype=torch.float32, device=CPU)
    torch.testing.assert_close(logits(ALIGNED, weights, tokens), expected, atol=ATOL, rtol=0)


def logits(config: Mapping[str, object], weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Of every token, by our model in the fp32 format; no entry is left out, so there are no ties."""
    geometry = KvGeometry.from_config(config, KvFormat.FP32)
    blocks = geometry.num_blocks(NUM_TOKENS)
    pools = KvPools.poisoned(geometry, PoolCapacity(1, blocks, blocks, blocks), CPU)
    table = torch.arange(blocks, dtype=torch.int32)
    model = Transformer(ModelSpec.from_config(config), geometry, weights, CPU)
    return model.prefill(tokens, PrefillChunk(0, 0, table, table, table), pools, all_logits=True).logits
