"""The sparse stage: each part learns from its own loss alone, both fall, and interruptions change nothing."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from forepage.errors import ModelFormatError, RequestError
from forepage.training.backbone import batch_stream, checkpoint
from forepage.training.backbone import run as run_module
from forepage.training.backbone.batch_stream import BatchStream, Feeder
from forepage.training.backbone.batches import make_batch
from forepage.training.backbone.checkpoint import Progress
from forepage.training.backbone.evaluation import Evaluation, Score
from forepage.training.backbone.indexer_fit import Fitting, Sample
from forepage.training.backbone.journal import Journal, journal, read_log
from forepage.training.backbone.network import Backbone, Watched
from forepage.training.backbone.official import export, official_weights
from forepage.training.backbone.optimizer import INDEXER
from forepage.training.backbone.run import Order, run
from forepage.training.backbone.sparse_training import SparseTraining
from forepage.training.backbone.step import TrainingStep
from forepage.training.backbone.trainer import Budget, Trainer
from rigs.tiny_training import SMALL, random_network, training_config

MODEL = SMALL | {"index_topk": 16}
"""At 512 tokens, a choice from 64 entries on average."""
NOTHING = 1e-30
"""A rate that leaves every float32 as it is."""
FOREVER = Budget(float("inf"))


def tuning(folder: Path, **changes: Any) -> SparseTraining:
    """Of a random network that selects."""
    changes = {"optimizer__warmup_steps": 1, "sparse__rows": 128} | changes
    return SparseTraining(random_network(MODEL), training_config(model=MODEL, **changes), folder)


def prepared(training: SparseTraining) -> tuple[TrainingStep, Fitting]:
    """A step with a batch in it, and what its indexers are to fit."""
    for parameter in training.network.parameters():
        parameter.requires_grad_()
    optimizers = training.optimizers
    step = TrainingStep(training.network, optimizers["backbone"], 512, indexers=optimizers["indexers"])
    batch = make_batch(training.config.data, training.stage, 5, 0)
    Feeder(step.inputs, buffers=1).feed(batch)
    sample = Sample.of(batch, step.packing, 128, np.random.default_rng(1))
    return step, Fitting(sample, training.config.indexer, training.network.spec.index_topk)


def gradients(network: Backbone) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def test_the_divergence_pulls_on_indexers_alone(tmp_path: Path) -> None:
    step, fitting = prepared(tuning(tmp_path))
    step.network(step.inputs, step.packing, sparse=True, watch=fitting)
    fitting.loss().backward()
    for name, gradient in gradients(step.network).items():
        if INDEXER in name:
            assert gradient is not None, name
            assert gradient.any(), name
        else:
            assert gradient is None, name


def test_a_step_gives_the_backbone_the_language_models_gradient_bit_for_bit(tmp_path: Path) -> None:
    """And the indexers nothing of it: a choice has no gradient."""
    step, fitting = prepared(tuning(tmp_path))
    step._gradients(None)
    alone = gradients(step.network)
    for parameter in step.network.parameters():
        parameter.grad = None
    step._gradients(fitting)
    for name, both in gradients(step.network).items():
        only = alone[name]
        if INDEXER in name:
            assert only is None, name
        else:
            assert only is not None, name
            assert both is not None, name
            assert only.any(), name
            assert torch.equal(only, both), name


def test_the_loss_of_a_step_is_that_under_the_selection(tmp_path: Path) -> None:
    step, fitting = prepared(tuning(tmp_path))
    with torch.no_grad():
        losses = {}
        for sparse in (False, True):
            streams, _ = step.network(step.inputs, step.packing, sparse=sparse)
            each, _ = step.network.head.losses(streams, step.inputs.targets)
            weights = step.inputs.weights
            losses[sparse] = ((each * weights).sum() / weights.sum()).item()
    step.run(fitting)
    loss = step.read().loss
    assert loss == pytest.approx(losses[True], abs=1e-6)
    assert abs(loss - losses[False]) > 1e-4


def test_the_target_is_the_attention_over_the_chosen_entries(tmp_path: Path) -> None:
    """By brute force, with the indexers' target left as the mass itself."""
    step, _ = prepared(tuning(tmp_path))
    places = torch.tensor([100, 333, 511])
    closed = torch.arange(128) < (places.unsqueeze(1) + 1) // 4
    target = training_config(indexer__cut=0.0, indexer__flatness=1.0, indexer__floor=1e-6).indexer
    fitting = Fitting(Sample(places, closed), target, MODEL["index_topk"])
    seen: list[Watched] = []
    with torch.no_grad():
        step.network(step.inputs, step.packing, sparse=True, watch=seen.append)
        (watched,) = seen
        fitting(watched)
    indexer = watched.attention.indexer
    assert indexer is not None
    assert watched.chosen is not None
    losses, weights = [], []
    for place in places.tolist():
        entries = watched.chosen[place].nonzero().flatten()
        assert len(entries) == 16
        near = torch.arange(max(0, place - 127), place + 1) + 128
        logits = watched.query[place] @ watched.stored[torch.cat((entries, near))].T * 128**-0.5
        sink = watched.attention.sink.detach()[:, None]
        mass = torch.cat((logits, sink), 1).softmax(1)[:, :16].mean(0)
        with torch.no_grad():
            latent = watched.attention.latent(watched.x)
            rope = (watched.rows.cos, watched.rows.sin)
            scores = indexer.scores(watched.x, latent, indexer.keys(watched.x, watched.rows), rope)
        predicted = scores[place, entries].log_softmax(0)
        wanted = mass / mass.sum()
        losses.append((wanted * (wanted.log() - predicted)).sum())
        weights.append(mass.sum())
    expected = (torch.stack(losses) * torch.stack(weights)).sum() / torch.stack(weights).sum()
    torch.testing.assert_close(fitting.fits[0].loss, expected, rtol=1e-3, atol=1e-5)


def trained(training: SparseTraining, folder: Path) -> list[dict[str, Any]]:
    """The whole stage, and its log."""
    training.begin(Progress())
    with journal(folder, 1.0) as notes, BatchStream(training.config.data) as stream:
        assert training.train(stream, notes, FOREVER, clock=lambda: 0.0)
    return read_log(folder)


def weights_of(network: Backbone, *, indexers: bool) -> dict[str, Tensor]:
    named = network.named_parameters()
    return {name: value.detach().clone() for name, value in named if (INDEXER in name) == indexers}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_both_losses_fall(tmp_path: Path) -> None:
    """On texts that no step was trained on, with the selection on."""
    training = tuning(tmp_path, sparse__steps=30, sparse__backbone_rate=0.5, sparse__indexer_rate=1.0)
    before, *_, after = trained(training, tmp_path)
    assert [before["when"], after["when"]] == ["before", "after"]
    assert after["sparse_loss"] < before["sparse_loss"] - 0.3
    assert after["sparse_answer_loss"] < before["sparse_answer_loss"]
    assert all(new < 0.75 * old for new, old in zip(after["kl"], before["kl"], strict=True)), (before, after)


def test_indexers_learn_beside_a_backbone_that_stands_still(tmp_path: Path) -> None:
    training = tuning(tmp_path, sparse__steps=20, sparse__backbone_rate=NOTHING, sparse__indexer_rate=1.0)
    backbone, indexers = (weights_of(training.network, indexers=each) for each in (False, True))
    before, *_, after = trained(training, tmp_path)
    assert same(backbone, weights_of(training.network, indexers=False))
    assert not same(indexers, weights_of(training.network, indexers=True))
    assert all(new < 0.75 * old for new, old in zip(after["kl"], before["kl"], strict=True)), (before, after)
    assert after["dense_loss"] == before["dense_loss"]


def test_a_backbone_learns_under_a_choice_that_stands_still(tmp_path: Path) -> None:
    training = tuning(tmp_path, sparse__steps=20, sparse__backbone_rate=0.5, sparse__indexer_rate=NOTHING)
    indexers = weights_of(training.network, indexers=True)
    before, *_, after = trained(training, tmp_path)
    assert same(indexers, weights_of(training.network, indexers=True))
    assert after["sparse_loss"] < before["sparse_loss"] - 0.3


def test_rates_are_the_factors_of_the_configs(tmp_path: Path) -> None:
    training = tuning(tmp_path, sparse__backbone_rate=0.05, sparse__indexer_rate=0.2)
    for part, factor in (("backbone", 0.05), ("indexers", 0.2)):
        optimizer = training.optimizers[part]
        optimizer.set_rates(1.0)
        assert optimizer.muon_lr.item() == pytest.approx(0.02 * factor)
        assert optimizer.adam.param_groups[0]["lr"] == pytest.approx(3e-3 * factor)
        assert all((INDEXER in name) == (part == "indexers") for name in optimizer.names)
    names = [name for optimizer in training.optimizers.values() for name in optimizer.names]
    assert sorted(names) == sorted(name for name, _ in training.network.named_parameters())


def test_time_ends_the_stage_where_no_number_of_steps_is_given(tmp_path: Path) -> None:
    training = tuning(tmp_path, sparse__steps=None, sparse__minutes=0.5)
    training.begin(Progress(seconds=100.0))
    ticks = iter(range(10_000))
    with journal(tmp_path, 1.0) as notes, BatchStream(training.config.data) as stream:
        assert training.train(stream, notes, FOREVER, clock=lambda: 3.0 * next(ticks))
    assert 2 <= training.progress.step <= 10
    assert training.progress.stage_seconds >= 30
    assert training.progress.seconds == 100 + training.progress.stage_seconds


@pytest.mark.parametrize(("moments", "warm_again"), [("float32", False), ("none", True)])
def test_rates_rise_again_where_moments_were_not_kept(tmp_path: Path, moments: str, warm_again: bool) -> None:
    changes: dict[str, Any] = {"optimizer__warmup_steps": 8, "sparse__steps": 100, "moments": moments}
    training = tuning(tmp_path, **changes)
    training.begin(Progress())
    with journal(tmp_path, 1.0) as notes, BatchStream(training.config.data) as stream:
        assert not training.train(stream, notes, Budget(float("inf"), 3))
        resumed = tuning(tmp_path, **changes)
        assert not resumed.train(stream, notes, Budget(float("inf"), 1))
    rate = resumed.optimizers["backbone"].muon_lr.item()
    assert rate == pytest.approx(0.02 * 0.05 * (1 if warm_again else 4) / 8)


@pytest.mark.parametrize("sparse", [True, False])
def test_answers_are_scored_as_the_weights_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sparse: bool
) -> None:
    """With the indexers' choice as soon as they have been trained, not before."""
    asked = []

    def forward(network: Backbone, *arguments: Any, **named: Any) -> Any:
        asked.append(named["sparse"])
        return Backbone.forward(network, *arguments, **named)

    def scores(trainer: Trainer, notes: Journal, **named: Any) -> list[Score]:
        monkeypatch.setattr(trainer.network, "forward", partial(forward, trainer.network))
        return scored(trainer, notes, **named)

    scored = run_module._scored
    monkeypatch.setattr(run_module, "_scored", scores)
    monkeypatch.setattr(Evaluation.scores, "__defaults__", (("records",),))
    config = training_config(model=MODEL, stage__steps=2, indexer__steps=1, sparse__steps=1)
    assert run(Order(config, tmp_path, steps=None if sparse else 1, device="cpu")) == sparse
    assert asked == [sparse]
    assert (tmp_path / "exact_match.md").exists()


class CutOffError(Exception):
    """The end of a process, as seen from within."""


def cut_at(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but for its call of that number, which ends the process."""
    calls = iter(range(1000))

    def cut(*arguments: Any, **named: Any) -> Any:
        if next(calls) == number:
            raise CutOffError
        return function(*arguments, **named)

    return cut


def whole_run(folder: Path, **changes: Any) -> bool:
    """Two steps of the curriculum, two of the warm-up, three sparse ones."""
    steps = {"stage__steps": 2, "indexer__steps": 2, "sparse__steps": 3}
    config = training_config(model=MODEL, **steps, **changes)
    return run(Order(config, folder, evaluate=False, device="cpu"))


def saved(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    found = checkpoint.load(folder / "sparse")
    assert found is not None
    return found.masters, found.optimizer, found.progress.step


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert whole_run(folder)
    return folder


BATCHES = 2 + 2 + 2 + 3 + 2
"""Curriculum, warm-up, comparison, sparse steps, comparison."""


@pytest.mark.parametrize("save_every_s", [0.0, 120.0], ids=["saved-at-each-step", "saved-at-ends"])
@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_run_cut_off_at_any_batch_ends_as_if_it_had_not_been(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, save_every_s: float
) -> None:
    for module in ("trainer", "sparse_training"):
        monkeypatch.setattr(f"forepage.training.backbone.{module}.SAVE_EVERY_S", save_every_s)
    with monkeypatch.context() as patch:
        patch.setattr(batch_stream, "make_batch", cut_at(batch, make_batch))
        with pytest.raises(CutOffError):
            whole_run(tmp_path)
    assert whole_run(tmp_path)
    assert_equal(tmp_path, uninterrupted)


SAVES = 4
"""After the curriculum, at the sparse stage's beginning, the backbone's with its indexers, at the end."""


@pytest.mark.parametrize("save", range(SAVES))
def test_a_run_cut_off_at_any_save_ends_as_if_it_had_not_been(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", cut_at(save, checkpoint.save))
        with pytest.raises(CutOffError):
            whole_run(tmp_path)
    assert whole_run(tmp_path)
    assert_equal(tmp_path, uninterrupted)


def test_a_run_in_calls_of_two_steps_ends_as_one_in_one_call(uninterrupted: Path, tmp_path: Path) -> None:
    config = training_config(model=MODEL, stage__steps=2, indexer__steps=2, sparse__steps=3)
    done = [run(Order(config, tmp_path, steps=2, evaluate=False, device="cpu")) for _ in range(3)]
    assert done == [False, False, True]
    assert_equal(tmp_path, uninterrupted)


def assert_equal(folder: Path, uninterrupted: Path) -> None:
    """Weights, moments and what is exported, bit for bit."""
    (masters, optimizer, step), (expected, moments, last) = saved(folder), saved(uninterrupted)
    assert step == last == 3
    assert same(masters, expected)
    assert same(optimizer, moments)
    exports = (load_file(each / "export" / "model.safetensors") for each in (folder, uninterrupted))
    assert same(*exports)


def test_the_stage_alone_begins_at_exported_weights_and_goes_on(tmp_path: Path) -> None:
    """Given as a folder, or as the file; no other stage is trained or reported."""
    given = tmp_path / "given"
    export(random_network(MODEL), MODEL, given)
    config = training_config(model=MODEL, sparse__steps=2)
    results = []
    for name, begin_at, steps in (
        ("folder", given, None),
        ("file", given / "model.safetensors", None),
        ("parts", given, 1),
    ):
        order = Order(
            config,
            tmp_path / name,
            begin_at=begin_at,
            only_sparse=True,
            steps=steps,
            evaluate=False,
            device="cpu",
        )
        assert run(order) == (steps is None)
        if steps is not None:
            assert run(order)
        assert not (order.folder / "checkpoint").exists()
        found = checkpoint.load(order.folder / "sparse")
        assert found is not None
        results.append(found.masters)
        body = json.loads((order.folder / "training.json").read_text(encoding="utf-8"))
        assert [row["stage"] for row in body["rows"]] == ["sparse"]
    assert same(results[0], results[1])
    assert same(results[0], results[2])
    assert not same(results[0], dict(official_weights(random_network(MODEL))))


def test_the_stage_alone_needs_weights(tmp_path: Path) -> None:
    config = training_config(model=MODEL)
    with pytest.raises(RequestError, match="begin-at"):
        run(Order(config, tmp_path / "none", only_sparse=True, evaluate=False, device="cpu"))
    missing = Order(
        config, tmp_path / "missing", begin_at=tmp_path / "no.safetensors", only_sparse=True, device="cpu"
    )
    with pytest.raises(ModelFormatError, match=r"no\.safetensors"):
        run(missing)
    assert not (tmp_path / "missing" / "sparse").exists()


def test_the_stage_alone_takes_a_run_as_far_as_it_is(tmp_path: Path) -> None:
    """The folder's own weights, where the curriculum was stopped early."""
    config = training_config(model=MODEL, stage__steps=4, sparse__steps=1)
    assert not run(Order(config, tmp_path, steps=1, evaluate=False, device="cpu"))
    assert run(Order(config, tmp_path, only_sparse=True, evaluate=False, device="cpu"))
    assert [row["phase"] for row in read_log(tmp_path)[1:]] == ["comparison", "sparse", "comparison"]
