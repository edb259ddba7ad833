"""The Lightning Indexers: they learn where attention goes, by brute-force shares; nothing else moves."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from forepage.training.backbone.batch_stream import BatchStream, Feeder
from forepage.training.backbone.batches import make_batch
from forepage.training.backbone.indexer_fit import (
    Sample,
    attention_mass,
    divergence,
    evidence_entries,
    kept_mass,
    wanted_mass,
)
from forepage.training.backbone.indexer_training import IndexerTraining
from forepage.training.backbone.journal import journal, read_log
from forepage.training.backbone.network import Backbone
from forepage.training.backbone.optimizer import INDEXER
from forepage.training.backbone.rows import attend
from rigs.tiny_training import SMALL, random_network, training_config

TOKENS, PLACES, HEADS, DIMS = 24, 6, 3, 16


def random_attention() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries [n, H, d], rows [P + n, d], sinks [H], what each token sees bool [n, P + n]."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(TOKENS, HEADS, DIMS, generator=generator) * 2
    stored = torch.randn(PLACES + TOKENS, DIMS, generator=generator)
    sink = torch.randn(HEADS, generator=generator)
    token = torch.arange(TOKENS).unsqueeze(1)
    closed = (torch.arange(PLACES) + 1) * 4 <= token + 1
    near = (torch.arange(TOKENS) <= token) & (token - torch.arange(TOKENS) < 8)
    return query, stored, sink, torch.cat((closed, near), dim=1)


def brute_force(query: Tensor, stored: Tensor, sink: Tensor, seen: Tensor) -> Tensor:
    """Shares f32 [n, H, P + n + 1] of the softmax with the sink as one more logit."""
    shares = torch.zeros(TOKENS, HEADS, PLACES + TOKENS + 1)
    for token in range(TOKENS):
        rows = seen[token].nonzero().flatten()
        for head in range(HEADS):
            logits = torch.stack([query[token, head] @ stored[row] / math.sqrt(DIMS) for row in rows])
            weights = torch.cat((logits, sink[head : head + 1])).softmax(0)
            shares[token, head, rows] = weights[:-1]
            shares[token, head, -1] = weights[-1]
    return shares


def test_attention_and_its_mass_equal_brute_force() -> None:
    query, stored, sink, seen = random_attention()
    shares = brute_force(query, stored, sink, seen)
    attended, lse = attend(query, stored, sink, seen)
    torch.testing.assert_close(attended, shares[..., :-1] @ stored, rtol=0, atol=2e-6)
    torch.testing.assert_close((sink - lse).exp(), shares[..., -1], rtol=0, atol=2e-6)
    places = torch.tensor([0, 3, 4, 11, 23, 11])
    mass = attention_mass(query[places], stored[:PLACES], lse[places], seen[places, :PLACES])
    torch.testing.assert_close(mass, shares[places, :, :PLACES].sum(1), rtol=0, atol=5e-6)
    assert not mass[0].any(), "nothing is closed at the first token"


def test_kept_mass_is_that_of_the_chosen_entries() -> None:
    mass = torch.tensor([[4.0, 3.0, 2.0, 1.0], [0.0, 0.0, 1.0, 9.0]])
    right = kept_mass(mass, mass, 2)
    reversed_order = kept_mass(mass, -mass, 2)
    assert right == 1.0
    assert reversed_order == pytest.approx((1 + 2 + 0 + 0) / (4 + 3 + 9 + 1))


def test_evidence_entries_are_those_of_one_percent_of_the_best() -> None:
    scores = torch.tensor([[0.95, 0.04, 0.009, 0.001], [0.25, 0.25, 0.25, 0.25]]).log()
    assert evidence_entries(scores, 4) == (2 + 4) / 2
    assert evidence_entries(scores, 2) == 2.0
    assert evidence_entries(torch.tensor([[0.0, -5.0, -5.0]]), 3) == 1.0


def test_wanted_mass_counts_what_is_above_the_cut_and_spreads_the_floor() -> None:
    plan = training_config(indexer__cut=0.1, indexer__floor=0.5, indexer__flatness=0.0).indexer
    share = torch.tensor([[0.4, 0.1, 0.05, 0.0]])
    closed = torch.tensor([[True, True, True, False]])
    expected = torch.tensor([[0.3 + 0.5 / 3, 0.5 / 3, 0.5 / 3, 0.0]])
    torch.testing.assert_close(wanted_mass(share, closed, plan), expected)
    none = torch.zeros_like(closed)
    assert not wanted_mass(torch.zeros(1, 4), none, plan).any()


def test_divergence_is_that_of_torch_with_tokens_weighed_by_what_they_want() -> None:
    generator = torch.Generator().manual_seed(4)
    scores, wanted = (torch.rand(5, 7, generator=generator) for _ in range(2))
    total = wanted.sum(1)
    each = torch.nn.functional.kl_div(scores.log_softmax(1), wanted / total[:, None], reduction="none").sum(1)
    torch.testing.assert_close(divergence(scores, wanted), (each * total).sum() / total.sum())
    assert not divergence(scores, torch.zeros(5, 7))
    torch.testing.assert_close(divergence(wanted.log(), wanted), torch.zeros(()), rtol=0, atol=1e-6)


def trainer(**changes: float) -> tuple[Backbone, IndexerTraining]:
    network = random_network(SMALL)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    config = training_config(indexer__rows=128, optimizer__warmup_steps=1, **changes)
    return network, IndexerTraining(network, config)


def loss_on_a_batch_not_trained_on(training: IndexerTraining) -> list[float]:
    """KL of every layer."""
    batch = make_batch(training.config.data, training.stage, 77, 0)
    Feeder(training.inputs, buffers=1).feed(batch)
    places = torch.arange(3, 512, 4)
    entries = torch.arange(training.packing.places) * 4
    closed = entries + 4 <= places.unsqueeze(1) + 1
    with torch.no_grad():
        fitting = training.fitted(Sample(places, closed))
    return [fit.loss.item() for fit in fitting.fits]


def test_divergence_falls_and_only_indexers_change(tmp_path: Path) -> None:
    network, training = trainer(indexer__floor=0.05)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    start = loss_on_a_batch_not_trained_on(training)
    with journal(tmp_path, 1.0) as notes, BatchStream(training.config.data) as stream:
        taken = training.train(stream, notes, until=math.inf, clock=lambda: 0.0, steps=30)
    assert taken == 30
    end = loss_on_a_batch_not_trained_on(training)
    assert len(start) == len(network.spec.c4_layers)
    assert all(after < 0.75 * first for first, after in zip(start, end, strict=True)), (start, end)
    for name, value in network.named_parameters():
        assert torch.equal(value, before[name]) == (INDEXER not in name), name
        assert not value.requires_grad
        assert value.grad is None
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    (row,) = read_log(tmp_path)
    assert row["steps"] == 30
    assert len(row["kl"]) == len(row["kept"]) == len(row["evidence"]) == len(start)


def test_a_sample_sees_closed_entries_of_its_own_document_and_half_of_it_is_answers() -> None:
    _, training = trainer(indexer__tokens=1024)
    batch = make_batch(training.config.data, training.stage, 0, 0)
    sample = training.sample(batch)
    assert len(sample.places) == 128
    assert (batch.kinds[sample.places[64:].numpy()] != 0).all()
    for place, closed in zip(sample.places.tolist(), sample.closed, strict=True):
        begin = place // 512 * 512
        assert closed.nonzero().flatten().tolist() == list(range(begin // 4, (place + 1) // 4))


def test_a_warm_up_without_rising_rates_is_allowed(tmp_path: Path) -> None:
    network = random_network(SMALL)
    training = IndexerTraining(network, training_config(optimizer__warmup_steps=0))
    with journal(tmp_path, 1.0) as notes, BatchStream(training.config.data) as stream:
        assert training.train(stream, notes, until=math.inf, clock=lambda: 0.0, steps=1) == 1


def test_time_ends_the_warm_up_too(tmp_path: Path) -> None:
    _, training = trainer()
    ticks = iter(range(1000))
    with journal(tmp_path, 1.0) as notes, BatchStream(training.config.data) as stream:
        taken = training.train(stream, notes, until=20.0, clock=lambda: float(next(ticks)), steps=None)
    assert 1 <= taken < 20
    assert training.train(stream, notes, until=0.0, clock=lambda: 1.0, steps=None) == 0
