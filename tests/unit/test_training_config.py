"""The file of a run: every wrong value stops it at once, and the error names the field."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from forepage.__main__ import app
from forepage.errors import ModelFormatError, RequestError
from forepage.training.backbone.config import TrainingConfig
from forepage.training.cli import CONFIGS
from rigs.tiny_training import MODEL, SMALL, raw_config, toml


def test_the_files_that_ship_are_right() -> None:
    files = sorted(CONFIGS.glob("*.toml"))
    assert files
    for path in files:
        config = TrainingConfig.read(path)
        assert config.spec.c4_layers
        assert config.spec.c128_layers
        assert sum(stage.share for stage in config.stages) == pytest.approx(1.0)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    raw = raw_config(minutes=2, stage__steps=7, optimizer__adam_betas=[0.5, 0.75])
    path.write_text(toml(raw), encoding="utf-8")
    config = TrainingConfig.read(path)
    assert config == TrainingConfig.from_dict(raw)
    assert config.stages[0].steps == 7
    assert config.optimizer.adam_betas == (0.5, 0.75)
    assert config.model == SMALL
    assert config.minutes == 2.0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": "one"}, "seed"),
        ({"seed": -1}, "seed"),
        ({"minute": 3.0}, "minute"),
        ({"minutes": "long"}, "minutes"),
        ({"moments": "float8"}, "moments"),
        ({"data": 3}, "[data]"),
        ({"data__workers": -1}, "[data] workers"),
        ({"data__suites": {"mrcr": -1.0}}, "[data] suites.mrcr"),
        ({"data__suites": {"mrcr": 0.0}}, "suites"),
        ({"data__suites": {"ruler_nothing": 1.0}}, "ruler_nothing"),
        ({"optimizer__speed": 1.0}, "[optimizer] speed"),
        ({"optimizer__adam_betas": [0.9]}, "[optimizer] adam_betas"),
        ({"optimizer__warmup_steps": 2.5}, "[optimizer] warmup_steps"),
        ({"optimizer__clip": 0.0}, "[optimizer] clip"),
        ({"stage": []}, "stages"),
        ({"stage__length": "512"}, "[stage] length"),
        ({"stage__length": 0}, "[stage] length"),
        ({"stage__length": 500, "stage__tokens": 500}, "length"),
        ({"stage__tokens": 768}, "length"),
        ({"stage__records": 1.5}, "[stage] records"),
        ({"stage__steps": None, "minutes": 0}, "share"),
        ({"indexer__tokens": 768}, "length"),
        ({"indexer__rows": 1}, "[indexer] rows"),
        ({"indexer__steps": 0}, "[indexer] steps"),
        ({"sparse__tokens": 768}, "length"),
        ({"sparse__rows": 1}, "[sparse] rows"),
        ({"sparse__steps": 0}, "[sparse] steps"),
        ({"sparse__backbone_rate": 0.0}, "[sparse] backbone_rate"),
        ({"sparse__indexer_rate": -0.2}, "[sparse] indexer_rate"),
        ({"sparse__speed": 1.0}, "[sparse] speed"),
        ({"evaluation__lengths": [512, 700]}, "length"),
        ({"evaluation__lengths": []}, "[evaluation] lengths"),
        ({"evaluation__steps": 0}, "[evaluation] steps"),
    ],
)
def test_a_wrong_value_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError) as caught:
        TrainingConfig.from_dict(raw_config(**change))
    assert named in caught.value.message


@pytest.mark.parametrize("missing", ["data", "optimizer", "indexer", "sparse", "evaluation", "model", "seed"])
def test_what_is_missing_is_named(missing: str) -> None:
    raw = raw_config()
    del raw[missing]
    with pytest.raises(RequestError, match=missing):
        TrainingConfig.from_dict(raw)


def test_the_models_own_fields_are_named_too() -> None:
    with pytest.raises(ModelFormatError, match="hc_mult"):
        TrainingConfig.from_dict(raw_config(model=MODEL | {"hc_mult": 0}))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("seed = ", "run.toml"),
        (toml(raw_config(optimizer__clip="small")), "clip"),
        (toml(raw_config(model=SMALL | {"model_type": "other"})), "model_type"),
    ],
)
def test_the_command_says_it_in_one_line(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    result = CliRunner().invoke(
        app, ["train", "backbone", "--out", str(tmp_path / "out"), "--config", str(path)]
    )
    assert result.exit_code == 1
    assert named in result.output
    assert len(result.output.splitlines()) == 1
    assert not (tmp_path / "out").exists()
