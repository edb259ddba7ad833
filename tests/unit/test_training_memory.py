"""What a step of the sparse stage takes, told beforehand: it fits the card that the shipped files are for."""

from dataclasses import replace

import pytest

from forepage.training.backbone import memory
from forepage.training.backbone.config import TrainingConfig
from forepage.training.backbone.memory import memory_text, sparse_step_memory
from forepage.training.cli import CONFIGS
from rigs.tiny_training import MODEL, random_network, training_config

H100_BYTES = 80e9


def test_the_files_that_ship_fit_one_h100() -> None:
    for path in CONFIGS.glob("*.toml"):
        config = TrainingConfig.read(path)
        step = sparse_step_memory(config)
        assert step.total < 0.75 * H100_BYTES
        streams = config.spec.hc_mult * config.spec.hidden_size * 2
        least = 2 * config.spec.num_layers * config.sparse.tokens * streams
        assert step.activations > least, "each sublayer keeps its streams, in bf16"


def test_parts_have_the_sizes_of_their_tensors() -> None:
    config = training_config(model=MODEL, sparse__length=1024, sparse__tokens=2048, sparse__rows=64)
    step = sparse_step_memory(config)
    parameters = sum(parameter.numel() for parameter in random_network(MODEL).parameters())
    layers = len(config.spec.c4_layers)
    assert layers == 2
    assert step.state == 16 * parameters
    assert step.choices == layers * 2048 * 512
    assert step.sample == 4 * 4 * layers * config.spec.index_heads * 64 * 512
    assert step.scores == 4 * 4 * 2048 * 256


def test_activations_grow_with_tokens_and_what_one_keeps_does_not_depend_on_how_many_are_probed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So no matrix of tokens by rows is among them, as attention keeps none on a GPU."""
    config = training_config(model=MODEL)
    one = sparse_step_memory(config).activations
    doubled = replace(config, sparse=replace(config.sparse, tokens=1024, length=1024))
    assert sparse_step_memory(doubled).activations == 2 * one
    monkeypatch.setattr(memory, "DOCUMENT_STEP", 1024)
    assert sparse_step_memory(config).activations == pytest.approx(one, rel=0.02)


def test_people_are_told_the_sum_and_its_parts() -> None:
    config = TrainingConfig.read(CONFIGS / "tiny.toml")
    step = sparse_step_memory(config)
    text = memory_text(config)
    assert f"about {step.total / 1e9:.0f} GB" in text
    assert f"activations {step.activations / 1e9:.1f}" in text
