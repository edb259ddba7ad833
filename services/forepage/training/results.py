"""training.json: one row a stage of training, in the shape of all our result files; each adds its own."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from forepage.checkout import commit_of_checkout

RESULT_FILE = "training.json"


@dataclass(frozen=True)
class StageRow:
    """Of one stage: backbone, warm-up (of the Lightning Indexers), sparse; dump, indexer, calibrate."""

    stage: str
    seconds: float | None
    peak_gpu_bytes: int | None  # None without a GPU
    samples_per_s: float | None
    sample: str  # what is counted
    final_metrics: Mapping[str, Any]


def write_row(folder: Path, row: StageRow, *, what: str, config: Mapping[str, Any]) -> None:
    """Add the row to `folder`/training.json, in place of an earlier one of the same stage."""
    path = folder / RESULT_FILE
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = [one for one in earlier.get("rows", []) if one["stage"] != row.stage]
    body = {
        "what": what,
        "command": "forepage " + " ".join(sys.argv[1:]),
        "commit": commit_of_checkout(),
        "date": datetime.now(UTC).date().isoformat(),
        "device": device(),
        "ceilings": None,
        "config": earlier.get("config", {}) | {row.stage: dict(config)},
        "why": {"ceilings": "a stage is held against no limit of the device"},
        "rows": [*rows, asdict(row)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def peak_gpu_bytes() -> int | None:
    """Of this process so far, or since `forget_peak`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def forget_peak() -> None:
    """Begin anew, with what is held now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def device() -> dict[str, Any]:
    """What measured."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "torch": torch.__version__}
