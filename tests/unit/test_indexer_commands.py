"""`forepage train ...` for the memory indexer, as a user runs it, and what a config must say."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from forepage.errors import RequestError
from forepage.model.spec import ModelSpec
from forepage.settings import SEEDED_MODEL
from forepage.training.cli import app
from forepage.training.indexer.commands import TINY
from forepage.training.indexer.config import Granularity, IndexerTrainingConfig, LabelRule
from rigs.indexer_training import SMALL, small_config

QUICK: dict[str, dict[str, Any]] = {
    "dump": {"lengths": [2048], "texts": [6], "validation_share": 0.34, "rows": 192},
    "fit": {"steps": 4, "validate_every": 2, "warmup_steps": 1},
}


def toml_file(folder: Path, **parts: dict[str, Any]) -> Path:
    """The small config with these changes, as a file."""
    lines, tables = [], []
    for name, value in SMALL.items():
        if isinstance(value, dict):
            tables.append((name, value | parts.get(name, {})))
        else:
            lines.append(f"{name} = {json.dumps(value)}")
    for name, table in tables:
        inner = {key: value for key, value in table.items() if isinstance(value, dict)}
        lines.append(f"[{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items() if key not in inner]
        for key, value in inner.items():
            lines.append(f"[{name}.{key}]")
            lines += [f"{one} = {share}" for one, share in value.items()]
    path = folder / "config.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def invoke(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_commands_train_from_a_synthetic_dump_to_what_is_served(tmp_path: Path) -> None:
    config = toml_file(tmp_path, **QUICK)
    where = ("--out", tmp_path, "--config", config)
    invoke("synthetic-dump", *where, "--model", SEEDED_MODEL)
    assert "stopped" in invoke("indexer", *where, "--device", "cpu", "--minutes", "0")
    assert "done" in invoke("indexer", *where, "--device", "cpu")
    assert "2,048" in invoke("calibrate", *where, "--device", "cpu")
    assert {path.name for path in (tmp_path / "export").iterdir()} == {
        "memory_indexer.safetensors",
        "memory_indexer.json",
        "calibration.json",
        "calibration.md",
        "calibration.png",
    }
    rows = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert [row["stage"] for row in rows] == ["indexer", "calibrate"]


def test_lookahead_does_all_of_it_from_a_models_folder(tmp_path: Path) -> None:
    dump = {"lengths": [1536], "texts": [2], "validation_share": 0.5, "rows": 60}
    config = toml_file(tmp_path, dump=dump, fit=QUICK["fit"])
    out = invoke(
        "lookahead", "--model", SEEDED_MODEL, "--out", tmp_path, "--config", config, "--device", "cpu"
    )
    assert "1,536" in out
    rows = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert [row["stage"] for row in rows] == ["dump", "indexer", "calibrate"]


def test_texts_too_short_to_plan_for_are_refused(tmp_path: Path) -> None:
    config = toml_file(tmp_path, dump={"lengths": [1024], "texts": [4], "rows": 480}, fit=QUICK["fit"])
    invoke("synthetic-dump", "--out", tmp_path, "--config", config, "--model", SEEDED_MODEL)
    short = config.read_text().replace("recent_tokens = 512", "recent_tokens = 766")
    config.write_text(short)
    result = CliRunner().invoke(app, ["indexer", "--out", str(tmp_path), "--config", str(config)])
    assert result.exit_code == 1
    assert "longer texts are needed" in result.output


def test_a_wrong_config_ends_in_one_line(tmp_path: Path) -> None:
    config = toml_file(tmp_path, fit={"joint_share": 2.0})
    result = CliRunner().invoke(app, ["indexer", "--out", str(tmp_path), "--config", str(config)])
    assert result.exit_code == 1
    assert "joint_share: must lie in 0..1" in result.output


def test_without_a_dump_the_folder_is_named(tmp_path: Path) -> None:
    config = toml_file(tmp_path)
    result = CliRunner().invoke(app, ["indexer", "--out", str(tmp_path), "--config", str(config)])
    assert result.exit_code == 1
    assert "header.msgpack" in result.output


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("dump", "texts", [1]),
        ("dump", "lengths", [100, 200]),
        ("dump", "validation_share", 0.0),
        ("dump", "mass", 1.5),
        ("dump", "suites", {"unheard_of": 1.0}),
        ("label", "mass", 0.9),
        ("label", "rule", "whim"),
        ("label", "min_layers", 0),
        ("fit", "steps", 0),
        ("fit", "unknown_field", 1),
        ("calibration", "evidence_recall", 0.0),
    ],
)
def test_a_config_that_is_wrong_names_the_part(section: str, field: str, value: object) -> None:
    with pytest.raises(RequestError, match=field if field != "rule" else section):
        small_config(**{section: {field: value}})


def test_labels_of_their_own_refuse_a_joint_loss() -> None:
    with pytest.raises(RequestError, match="joint_share"):
        small_config(label={"rule": "own_layer"}, fit={"joint_share": 0.5})


def test_the_bundled_configs_are_whole() -> None:
    tiny = IndexerTrainingConfig.read(TINY)
    assert tiny.label.rule is LabelRule.EVIDENCE
    assert tiny.label.granularity is Granularity.BLOCK
    flash = IndexerTrainingConfig.read(TINY.with_name("flash.toml"))
    assert (flash.fit.heads, flash.fit.rank, flash.dump.target_layers) == (128, 2048, (10, 12, 20))
    assert flash.model is not None
    spec = ModelSpec.from_config(flash.model)
    assert (spec.hidden_size, len(spec.c4_layers), spec.index_dims) == (4096, 21, 128)
