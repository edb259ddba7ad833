"""A model split over ranks says what it says on one: over every layer type, both routings, paged or not."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from forepage.errors import ModelFormatError
from forepage.kv.geometry import KvFormat, KvGeometry
from forepage.model.kv_pools import KvPools, PrefillChunk
from forepage.model.rank_group import ALONE, RankGroup, RankLostError
from forepage.model.spec import ModelSpec
from forepage.model.tensor_parallel import check_split, rank_spans
from forepage.model.transformer import Transformer
from forepage.model.weight_table import weight_table
from forepage.model.weights import load_or_seed, seeded_weights
from rigs.checkpoint_writer import stored_tensors, write_checkpoint
from rigs.parity import ATOL, SEED, Sequences, Subject
from rigs.parity_configs import MIXED
from rigs.parity_ranks import CASES, FOUR_WAYS, NUM_TOKENS, Case, rank_differences, split_model, text
from rigs.ranks import CPU, on_ranks
from rigs.tie_breaker import TieBreaker


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_split_model_says_what_one_rank_says(case: Case) -> None:
    for rank, differences in enumerate(rank_differences(case)):
        assert {how: diff for how, diff in differences.items() if not diff <= ATOL} == {}, rank


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_hold_the_same_bits(num_ranks: int) -> None:
    """FP8 rows would show the least difference as a jump; a rank that drifts selects other entries."""
    case = Case("fp8", FOUR_WAYS | {"head_dim": 128, "qk_rope_head_dim": 64, "index_head_dim": 128}, 32, 4)
    tokens = text(case)

    def run(ranks: RankGroup) -> tuple[list[Tensor], KvPools]:
        model = split_model(case, ranks, kv=KvFormat.FP8)
        subject = Subject(model, tokens, torch.zeros(NUM_TOKENS, model.spec.vocab_size), TieBreaker([], []))
        sequences = Sequences(subject, 2, NUM_TOKENS)
        for sequence, length in enumerate((300, 390)):
            sequences.prefill(sequence, length, 128)
        outputs = []
        for step in range(4):
            sequences.decode(torch.tensor((300, 390)) + step)
        chunk = PrefillChunk(0, 304, *([sequences.table[0]] * 3))
        output = model.prefill(tokens[304:310], chunk, sequences.pools, all_logits=True)
        outputs += [output.logits, output.hidden, *(tap.scores for tap in output.indexer)]
        return outputs, sequences.pools

    (outputs, pools), *others = on_ranks(num_ranks, run)
    assert outputs[0].isfinite().all()
    for other_outputs, other_pools in others:
        for ours, theirs in zip(outputs, other_outputs, strict=True):
            assert torch.equal(ours, theirs)
        for item in fields(KvPools):
            ours, theirs = getattr(pools, item.name), getattr(other_pools, item.name)
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), item.name


def test_half_precision_products_are_summed_in_fp32() -> None:
    """The sum of two ranks' bf16 products is rounded once, so it stays within a bf16 step of one rank's."""
    case = CASES[0]
    spec = ModelSpec.from_config(case.full_config)
    x = torch.randn(5, spec.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()

    def attend(ranks: RankGroup) -> Tensor:
        weights = seeded_weights(
            spec, SEED, dtype=torch.bfloat16, device=CPU, rank=ranks.rank, num_ranks=ranks.num_ranks
        )
        geometry = KvGeometry.from_config(case.full_config, KvFormat.FP32)
        model = Transformer(spec, geometry, weights, CPU, ranks=ranks)
        return model._layers[0].moe.forward(x, torch.arange(5))

    with torch.inference_mode():
        alone = attend(ALONE)
    split, again = on_ranks(2, attend)
    assert split.dtype == torch.bfloat16
    assert torch.equal(split, again)
    step = torch.finfo(torch.bfloat16).eps * alone.abs().float()
    assert ((split.float() - alone.float()).abs() <= step).all()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_seeded_parts_are_slices_of_the_same_draws(num_ranks: int) -> None:
    spec = ModelSpec.from_config(FOUR_WAYS)
    whole = seeded_weights(spec, SEED, dtype=torch.float32, device=CPU)
    parts = [
        seeded_weights(spec, SEED, dtype=torch.float32, device=CPU, rank=rank, num_ranks=num_ranks)
        for rank in range(num_ranks)
    ]
    for name, entry in weight_table(spec).items():
        held = [part[name] for part in parts if name in part]
        assert len(held) == (1 if entry.expert is not None else num_ranks), name
        if entry.expert is not None or held[0].shape == whole[name].shape:
            assert all(torch.equal(part, whole[name]) for part in held), name
        else:
            dim = 0 if held[0].shape[0] != whole[name].shape[0] else 1
            assert torch.equal(torch.cat(held, dim), whole[name]), name


def test_rank_reads_only_its_part_of_a_checkpoint(tmp_path: Path) -> None:
    config = FOUR_WAYS | {"hidden_size": 256, "head_dim": 128, "qk_rope_head_dim": 64, "o_lora_rank": 64}
    config |= {"quantization_config": {"quant_method": "fp8"}}
    write_checkpoint(tmp_path, config, stored_tensors(config))
    spec = ModelSpec.from_config(config)
    whole = load_or_seed(tmp_path, spec, dtype=torch.float32, device=CPU)
    for rank in range(2):
        part = load_or_seed(tmp_path, spec, dtype=torch.float32, device=CPU, rank=rank, num_ranks=2)
        spans = rank_spans(spec, rank=rank, num_ranks=2)
        assert part.keys() == spans.keys()
        for name, span in spans.items():
            expected = whole[name][span.rows]
            expected = expected[:, span.columns] if expected.dim() == 2 else expected
            assert torch.equal(part[name], expected), name


def test_refusal_names_what_does_not_divide() -> None:
    spec = ModelSpec.from_config(MIXED | {"n_routed_experts": 6})
    with pytest.raises(ModelFormatError, match=r"4 ranks: o_groups 2, n_routed_experts 6 do not divide"):
        check_split(spec, 4)
    with pytest.raises(ModelFormatError, match="o_groups 2 does not divide"):
        Transformer(
            ModelSpec.from_config(MIXED),
            KvGeometry.from_config(MIXED, KvFormat.FP32),
            {},
            CPU,
            ranks=RankGroup(0, 8),
        )


def test_lost_rank_is_an_error_of_its_own() -> None:
    def leave_or_sum(ranks: RankGroup) -> str:
        if ranks.rank == 1:
            return "left"  # its group, and with it its connections, go away here
        with pytest.raises(RankLostError, match="another rank is gone"):
            ranks.all_reduce(torch.zeros(4))
        return "noticed"

    assert on_ranks(2, leave_or_sum) == ["noticed", "left"]
