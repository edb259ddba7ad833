"""`forepage train backbone` from end to end: trains, goes on, exports what is served, scores and reports."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from forepage.__main__ import app
from forepage.kv.geometry import KvFormat
from forepage.suites.registry import SUITES
from forepage.training.backbone.checkpoint import load
from forepage.training.backbone.evaluation import Score, table
from forepage.training.backbone.journal import read_log
from rigs.tiny_training import SMALL, random_tokens, raw_config, served_logits, toml


def train(folder: Path, *arguments: str, **changes: Any) -> Result:
    """In `folder`/run."""
    folder.mkdir(exist_ok=True)
    config = folder / "run.toml"
    config.write_text(toml(raw_config(**changes)), encoding="utf-8")
    command = ["train", "backbone", "--out", str(folder / "run"), "--config", str(config), "--device", "cpu"]
    return CliRunner().invoke(app, [*command, *arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, its indexers warmed up, two sparse steps, scored."""
    folder = tmp_path_factory.mktemp("finished")
    result = train(folder, stage__steps=3, sparse__steps=2)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == "done"
    return folder / "run"


def test_a_run_leaves_export_checkpoint_log_and_report(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    files = {"log.jsonl", "training.json", "training.png", "exact_match.md"}
    assert names == files | {"export", "checkpoint", "sparse"}
    assert [path.name for path in (finished / "sparse").iterdir()] == ["checkpoint"]
    log = read_log(finished)
    phases = [row.get("phase", row.get("name")) for row in log]
    assert phases == ["records", "indexer", "comparison", "sparse", "comparison"]
    assert log[0]["steps"] == log[0]["total_steps"] == 3
    assert log[0]["tokens"] == 3 * 512
    assert 3 < log[0]["loss"] < 8, "of 320 tokens at random: ln 320 is 5.8"
    assert (finished / "training.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_says_what_was_measured(finished: Path) -> None:
    body = json.loads((finished / "training.json").read_text(encoding="utf-8"))
    row, warm_up, sparse = body["rows"]
    last, warmed, before, tuned, after = read_log(finished)
    assert [each["stage"] for each in body["rows"]] == ["backbone", "warm-up", "sparse"]
    assert row["seconds"] == last["seconds"]
    assert row["peak_gpu_bytes"] is None or torch.cuda.is_available()
    assert row["final_metrics"]["stages"]["records"]["loss"] == last["loss"]
    assert warm_up["final_metrics"]["kl"] == warmed["kl"]
    assert warm_up["final_metrics"]["steps"] == warmed["steps"] == 3
    metrics = sparse["final_metrics"]
    assert [metrics[key] for key in ("step", "loss", "kl")] == [2, tuned["loss"], tuned["kl"]]
    assert sparse["seconds"] == tuned["stage_seconds"]
    for name, side in (("before", before), ("after", after)):
        assert side["when"] == name
        assert metrics[name]["sparse_loss"] == side["sparse_loss"]
        assert metrics[name]["kl"] == side["kl"]
    scores = [Score(**score) for score in metrics["exact_match"]]
    assert [score.suite for score in scores] == ["records", *SUITES]
    assert all(score.n > 0 and 0 <= score.exact_match <= 1 for score in scores)
    assert (finished / "exact_match.md").read_text(encoding="utf-8") == table(scores) + "\n"
    assert body["config"]["backbone"]["model"] == SMALL
    assert body["config"]["sparse"]["indexer_rate"] == 0.2


def test_the_export_is_what_the_checkpoint_holds_and_can_be_served(finished: Path) -> None:
    found = load(finished / "sparse")
    assert found is not None
    exported = load_file(finished / "export" / "model.safetensors")
    assert exported.keys() == found.masters.keys()
    for name, value in exported.items():
        assert torch.equal(value, found.masters[name].to(value.dtype)), name
    logits = served_logits(finished / "export", random_tokens(512), KvFormat.FP8, chunk=512)
    assert logits.isfinite().all()
    assert logits.std() > 0


def test_a_run_begins_at_exported_weights(finished: Path, tmp_path: Path) -> None:
    """With rates of all but 0 they stay as they were."""
    result = train(
        tmp_path,
        *("--steps", "1", "--no-evaluate", "--begin-at", str(finished / "export")),
        optimizer__muon_lr=1e-30,
        optimizer__adam_lr=1e-30,
        optimizer__balance_rate=0.0,
    )
    assert result.exit_code == 0, result.output
    before, after = (
        load_file(folder / "export" / "model.safetensors") for folder in (finished, tmp_path / "run")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_time_stops_a_run_and_the_same_command_goes_on(tmp_path: Path) -> None:
    first = train(tmp_path, "--minutes", "0", "--no-evaluate")
    assert "run it again to go on" in first.output
    assert not read_log(tmp_path / "run"), "no step was taken"
    second = train(tmp_path, "--steps", "1", "--no-evaluate")
    assert "run it again to go on" in second.output
    third = train(tmp_path, "--steps", "3", "--no-evaluate")
    assert "run it again to go on" in third.output, "the backbone is done, the sparse stage is not"
    fourth = train(tmp_path, "--no-evaluate")
    assert fourth.output.splitlines()[-1] == "done"
    log = read_log(tmp_path / "run")
    taken = [(row["steps"], row["total_steps"]) for row in log if "total_steps" in row]
    assert taken == [(1, 1), (3, 4), (4, 8)]
    fifth = train(tmp_path, "--no-evaluate")
    assert fifth.output.splitlines()[-1] == "done"
    assert read_log(tmp_path / "run") == log, "nothing is left to train"


def test_without_matplotlib_only_the_picture_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = train(tmp_path, "--steps", "1", "--no-evaluate")
    assert result.exit_code == 0
    assert "no training.png" in result.output
    assert (tmp_path / "run" / "training.json").exists()
    assert not (tmp_path / "run" / "training.png").exists()
