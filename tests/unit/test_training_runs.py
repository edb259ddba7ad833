"""A training run: resumed it is the same, its checkpoint is whole or the last, and the command works."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from forepage.__main__ import app
from forepage.errors import ModelFormatError
from forepage.training.backbone import checkpoint
from forepage.training.backbone.batch_stream import BatchStream
from forepage.training.backbone.checkpoint import Progress
from forepage.training.backbone.journal import journal, read_log
from forepage.training.backbone.official import official_weights
from forepage.training.backbone.optimizer import rate_factor
from forepage.training.backbone.trainer import Budget, Trainer
from rigs.tiny_training import CPU, raw_config, toml, training_config


def trained(folder: Path, *, steps: int | None) -> dict[str, torch.Tensor]:
    """Take up to so many more steps of the backbone in this folder; the masters after them."""
    config = training_config()
    with journal(folder, 60.0) as notes, BatchStream(config.data) as stream:
        trainer = Trainer(config, folder, CPU)
        trainer.train(stream, notes, Budget(float("inf"), steps))
    return {name: value.clone() for name, value in official_weights(trainer.network).items()}


def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", steps=None)
    trained(tmp_path / "parts", steps=2)
    parts = trained(tmp_path / "parts", steps=None)
    steps = [[row["steps"] for row in read_log(tmp_path / name)] for name in ("whole", "parts")]
    assert steps == [[4], [2, 2]], "the second call took only the steps that were left"
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


def test_a_save_that_was_cut_off_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    masters, moments = {"a": torch.ones(3)}, {"muon.0": torch.zeros(2)}
    checkpoint.save(tmp_path, Progress(step=1), masters, moments, moments="float32")
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.new")  # cut off between its last two steps
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert found.progress.step == 1
    (tmp_path / "checkpoint.new" / "state.json").unlink()  # cut off while parts were written
    assert checkpoint.load(tmp_path) is None


def test_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, Progress(), {"a": torch.ones(1)}, {}, moments="none")
    state = tmp_path / "checkpoint" / "state.json"
    state.write_text(json.dumps({"version": 99, **asdict(Progress())}), encoding="utf-8")
    with pytest.raises(ModelFormatError, match=r"state\.json"):
        checkpoint.load(tmp_path)


def test_command_trains_exports_and_logs(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(toml(raw_config()), encoding="utf-8")
    command = [
        "train",
        "backbone",
        "--out",
        str(tmp_path / "out"),
        "--config",
        str(config),
        "--device",
        "cpu",
    ]
    result = CliRunner().invoke(app, [*command, "--steps", "2", "--no-evaluate"])
    assert result.exit_code == 0, result.output
    assert "run it again to go on" in result.output
    assert (tmp_path / "out" / "export" / "model.safetensors").exists()
    assert (tmp_path / "out" / "log.jsonl").read_text(encoding="utf-8").count("\n") == 1


def test_rates_rise_stay_and_fall() -> None:
    config = training_config().optimizer
    assert rate_factor(config, step=0, progress=0.0) == pytest.approx(0.5)  # of two steps of warm-up
    assert rate_factor(config, step=9, progress=0.5) == 1.0
    assert rate_factor(config, step=9, progress=0.75) == pytest.approx(0.5)
    assert rate_factor(config, step=9, progress=1.0) == pytest.approx(0.1)
