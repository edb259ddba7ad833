"""The training network is the served model: same logits from exported weights, packed or alone."""

from pathlib import Path

import pytest
import torch

from forepage.errors import ModelFormatError
from forepage.kv.geometry import KvFormat
from forepage.training.backbone.maths import fp8_rounded
from forepage.training.backbone.muon import orthogonalised
from forepage.training.backbone.network import Backbone, Layer
from forepage.training.backbone.official import export, start_from
from forepage.training.backbone.packing import visibility
from forepage_kernels.layout import RowLayout, decode_rows, encode_rows
from rigs.tiny_training import (
    CPU,
    MODEL,
    packed_inputs,
    random_network,
    random_tokens,
    served_logits,
    served_outputs,
    training_logits,
)

NUM_TOKENS = 1024
NEARLY = 5e-3
SAME = 2e-5
"""fp32 sums in another order; the bound that the served model keeps against its own oracle."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported network."""
    folder = tmp_path_factory.mktemp("export")
    export(random_network(MODEL), MODEL, folder)
    return folder


@pytest.fixture(scope="module")
def network(folder: Path) -> Backbone:
    """A network that starts from the export, so both sides hold the same numbers."""
    network = random_network(MODEL)
    start_from(network, folder)
    return network


@pytest.mark.parametrize("chunk", [NUM_TOKENS, 100])
def test_logits_are_those_of_the_served_model(folder: Path, network: Backbone, chunk: int) -> None:
    tokens = random_tokens(NUM_TOKENS)
    trained = training_logits(network, [tokens])
    served = served_logits(folder, tokens, KvFormat.FP32, chunk=chunk)
    torch.testing.assert_close(trained, served, rtol=0, atol=SAME)
    assert trained.std() > 0.1


def test_fp8_rows_are_the_caches_bit_for_bit() -> None:
    """Nope dims e4m3 under a power of two per 64, rope dims bf16: as the row codec stores and reads them."""
    layout = RowLayout(64, 128, 64, "fp8")
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-6, 4, 256)[:, None]  # from below the least scale on
    rows = torch.randn(256, 192, generator=generator) * sizes
    rows[:, 64:128] *= 100  # the two groups of a row have scales of their own
    stored = decode_rows(*encode_rows(rows, layout), layout)
    assert torch.equal(fp8_rounded(rows, 64, torch.ones(())), stored)
    assert torch.equal(fp8_rounded(rows, 64, torch.zeros(())), rows)
    assert not torch.equal(rows, stored)


def test_gradient_passes_straight_through_the_rounding() -> None:
    rows = torch.randn(8, 192, generator=torch.Generator().manual_seed(1)).requires_grad_()
    upstream = torch.randn(8, 192, generator=torch.Generator().manual_seed(2))
    fp8_rounded(rows, 64, torch.ones(())).backward(upstream)
    assert rows.grad is not None
    assert torch.equal(rows.grad, upstream)


@pytest.mark.parametrize("seed", range(3))
def test_with_fp8_rows_nearly_all_tokens_have_the_served_logits(
    folder: Path, network: Backbone, seed: int
) -> None:
    """A value within fp32 noise of a tie gets the neighbouring code, 1/16 of itself away, and is seen by all
    tokens after it: up to 4e-3 were measured. Where that turns a choice of experts, a token differs by more.
    """
    tokens = random_tokens(NUM_TOKENS, seed)
    served = served_logits(folder, tokens, KvFormat.FP8, chunk=NUM_TOKENS)
    plain, rounded = (training_logits(network, [tokens], fp8=fp8) for fp8 in (False, True))
    off, unrounded = ((logits - served).abs().amax(1) for logits in (rounded, plain))
    assert (off < NEARLY).float().mean() > 0.99
    assert (unrounded > 4 * NEARLY).float().mean() > 0.9, "what rounding itself does is much more"


def test_indexers_score_as_the_served_ones(folder: Path, network: Backbone) -> None:
    """So what the warm-up teaches is what selects: the scores of every entry that the served model took."""
    tokens = random_tokens(NUM_TOKENS)
    (served,) = served_outputs(folder, tokens, KvFormat.FP32, chunk=NUM_TOKENS)
    taps = iter(served.indexer)
    inputs, packing = packed_inputs([tokens])
    with torch.no_grad():
        streams = network.embedded(inputs.tokens)
        rows = network.rows(inputs, packing)
        for layer in network.layers:
            assert isinstance(layer, Layer)
            own = rows[layer.ratio]
            x, *_ = layer.read(streams, own.cos, own.sin, own.flattening, own.fp8_share)
            streams, _ = layer(streams, inputs.tokens, own)
            indexer = layer.attention.indexer
            if indexer is None:
                continue
            scores = indexer.scores(x, layer.attention.latent(x), indexer.keys(x, own), (own.cos, own.sin))
            tap = next(taps)
            taken = tap.selected >= 0
            assert taken.sum() == sum((token + 1) // 4 for token in range(NUM_TOKENS))
            ours = scores.gather(1, tap.selected.clamp(min=0))
            torch.testing.assert_close(ours[taken], tap.scores[taken], rtol=0, atol=SAME)
            assert tap.scores[taken].std() > 0.05
    assert next(taps, None) is None


def test_start_from_refuses_what_does_not_fit(folder: Path) -> None:
    other = random_network(MODEL | {"moe_intermediate_size": 64})
    with pytest.raises(ModelFormatError, match=r"experts\.0\.w1"):
        start_from(other, folder)


def test_packed_documents_do_not_see_each_other(network: Backbone) -> None:
    first, second = random_tokens(512, seed=1), random_tokens(1024, seed=2)
    both = training_logits(network, [first, second])
    alone = torch.cat([training_logits(network, [first]), training_logits(network, [second])])
    torch.testing.assert_close(both, alone, rtol=0, atol=SAME)


def test_visibility_is_closed_entries_and_window_of_the_own_document() -> None:
    starts = torch.tensor([0] * 512 + [512] * 512, dtype=torch.int32)
    rule = visibility(starts, 4, 256, 128)
    zero = torch.zeros((), dtype=torch.int64)
    for token in (0, 3, 127, 128, 511, 512, 700, 1023):
        for row in range(256 + 1024):
            seen = bool(rule(zero, zero, torch.tensor(token), torch.tensor(row)))
            start = int(starts[token])
            if row < 256:
                assert seen == (row * 4 >= start and row * 4 + 3 <= token)
            else:
                other = row - 256
                assert seen == (start <= other <= token and token - other < 128)


def test_muon_makes_singular_values_alike() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, 24, 40, device=CPU) @ torch.diag(torch.logspace(0, -2, 40))
    values = torch.linalg.svdvals(orthogonalised(matrices).float())
    assert values.max() < 1.3
    assert values.min() > 0.5
