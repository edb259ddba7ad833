"""A small training of a memory indexer: its config, and a synthetic dump with a rule to learn."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from forepage.settings import SEEDED_MODEL
from forepage.training.indexer.config import IndexerTrainingConfig
from forepage.training.indexer.synthetic import synthetic_dump

MODEL_CONFIG: dict[str, Any] = json.loads((SEEDED_MODEL / "config.json").read_text(encoding="utf-8"))
SMALL: dict[str, Any] = {
    "interval": 16,
    "recent_tokens": 512,
    "dump": {
        "seed": 3,
        "lengths": [2048, 4096],
        "texts": [40, 10],
        "validation_share": 0.2,
        "rows": 768,
        "mass": 0.6,
        "target_layers": [0, 2],
        "suites": {"ruler_niah_single_1": 1.0, "mrcr": 1.0},
    },
    "label": {"rule": "evidence", "granularity": "block", "mass": 0.6, "min_layers": 2},
    "fit": {
        "seed": 5,
        "heads": 8,
        "rank": 64,
        "start": "random",
        "loss": "focal",
        "steps": 300,
        "texts_per_step": 1,
        "rows": 24,
        "first_share": 0.5,
        "lr": 1e-2,
        "weight_decay": 0.0,
        "warmup_steps": 5,
        "clip": 1.0,
        "gamma": 2.0,
        "positive_weight": 1.0,
        "hard_negatives": 4,
        "random_negatives": 4,
        "mine_from": 0,
        "joint_share": 0.5,
        "entry_share": 0.5,
        "jitter_share": 0.0,
        "jitter_tokens": 0,
        "validate_every": 100,
        "cache_bytes": 1 << 30,
        "store_bf16": False,
    },
    "calibration": {"evidence_recall": 0.9, "budgets": [1, 2, 4, 16], "least_layers": 1, "most_layers": 2},
}
CPU = torch.device("cpu")


def small_config(**parts: dict[str, Any]) -> IndexerTrainingConfig:
    """The small config with some fields of its sections changed."""
    raw = {
        name: value | parts.get(name, {}) if isinstance(value, dict) else value
        for name, value in SMALL.items()
    }
    return IndexerTrainingConfig.from_dict(raw)


def small_dump(folder: Path, config: IndexerTrainingConfig) -> Path:
    """A synthetic dump of this config at the bundled model's sizes."""
    synthetic_dump(config, MODEL_CONFIG, folder)
    return folder


def shorter(config: IndexerTrainingConfig, steps: int) -> IndexerTrainingConfig:
    """The same with fewer steps."""
    return replace(config, fit=replace(config.fit, steps=steps))
