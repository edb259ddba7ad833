"""The run's figures: rows in the shape of our result files, the loss curve, and the exact-match table."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from forepage.training.backbone.evaluation import Score, table
from forepage.training.backbone.journal import read_log

RESULT_FILE = "training.json"
CURVE_FILE = "training.png"
TABLE_FILE = "exact_match.md"


def write_report(folder: Path, config: Mapping[str, Any], scores: Sequence[Score]) -> None:
    """Write training.json, training.png and exact_match.md beside the log they are made from."""
    log = [row for row in read_log(folder) if "loss" in row]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    rows = [_row(log, peak, scores)]
    result = {
        "what": "training of forepage-tiny's backbone",
        "command": "forepage " + " ".join(sys.argv[1:]),
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "device": _device(),
        "ceilings": {},
        "config": dict(config),
        "rows": rows,
    }
    (folder / RESULT_FILE).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if scores:
        (folder / TABLE_FILE).write_text(table(scores) + "\n", encoding="utf-8")
    if log:
        draw_curve(log, folder / CURVE_FILE)


def draw_curve(log: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss and answers' accuracy over seconds of training, stages apart. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (losses, rights) = plt.subplots(2, 1, figsize=(9, 8), sharex=True, layout="constrained")
    seconds = [row["seconds"] for row in log]
    for name in ("loss", "answer_loss"):
        losses.plot(seconds, [row[name] for row in log], label=name.replace("_", " "))
    losses.set_yscale("log")
    for kind in sorted({kind for row in log for kind in row["accuracy"]}):
        points = [(row["seconds"], row["accuracy"][kind]) for row in log if kind in row["accuracy"]]
        rights.plot(*zip(*points, strict=True), label=kind, linewidth=1)
    for axes in (losses, rights):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6, ncols=2)
    rights.set_xlabel("seconds of training")
    rights.set_ylabel("answers' tokens right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _row(log: Sequence[Mapping[str, Any]], peak: int | None, scores: Sequence[Score]) -> dict[str, Any]:
    """The shape of our result files."""
    last = log[-1] if log else None
    stages = {}
    for row in log:
        stages[row["name"]] = {
            key: row[key] for key in ("step", "stage_seconds", "tokens_per_s", "loss", "answer_loss")
        }
    return {
        "stage": "backbone",
        "seconds": None if last is None else last["seconds"],
        "peak_gpu_bytes": peak,
        "samples_per_s": None if last is None else last["tokens_per_s"],
        "sample": "token",
        "final_metrics": {"stages": stages, "exact_match": [asdict(score) for score in scores]},
    }


def _device() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "torch": torch.__version__}


def _commit() -> str | None:
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
