"""The training network is the served model: same logits from exported weights, packed or alone."""

from pathlib import Path

import pytest
import torch

from forepage.kv.geometry import KvFormat
from forepage.training.backbone.muon import orthogonalised
from forepage.training.backbone.network import Backbone
from forepage.training.backbone.official import export, start_from
from forepage.training.backbone.packing import visibility
from rigs.tiny_training import (
    CPU,
    MODEL,
    random_network,
    random_tokens,
    served_logits,
    training_logits,
)

NUM_TOKENS = 1024
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


def test_fp8_rows_are_nearer_to_the_served_ones_than_plain_rows_are(folder: Path, network: Backbone) -> None:
    """Rounding cliffs part some values, so not bit for bit; but the simulation must be most of the way."""
    tokens = random_tokens(NUM_TOKENS)
    served = served_logits(folder, tokens, KvFormat.FP8, chunk=NUM_TOKENS)
    plain, rounded = (training_logits(network, [tokens], fp8=fp8) for fp8 in (False, True))
    assert (rounded - served).abs().median() < 0.2 * (plain - served).abs().median()


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
