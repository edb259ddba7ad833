"""The run's figures: rows in the shape of our result files, the loss curve, and the exact-match table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from forepage.training.backbone.evaluation import Score, table
from forepage.training.backbone.journal import read_log
from forepage.training.results import StageRow, peak_gpu_bytes, write_row

CURVE_FILE = "training.png"
TABLE_FILE = "exact_match.md"


def write_report(folder: Path, config: Mapping[str, Any], scores: Sequence[Score]) -> None:
    """Write training.json, training.png (if it can be drawn) and exact_match.md beside the log."""
    log = [row for row in read_log(folder) if "loss" in row]
    write_row(folder, _row(log, scores), what="training of forepage-tiny's backbone", config=config)
    if scores:
        (folder / TABLE_FILE).write_text(table(scores) + "\n", encoding="utf-8")
    if log and can_draw():
        draw_curve(log, folder / CURVE_FILE)


def can_draw() -> bool:
    """Whether matplotlib is there, which no service needs."""
    return find_spec("matplotlib") is not None


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


def _row(log: Sequence[Mapping[str, Any]], scores: Sequence[Score]) -> StageRow:
    last = log[-1] if log else None
    stages = {}
    for row in log:
        stages[row["name"]] = {
            key: row[key] for key in ("step", "stage_seconds", "tokens_per_s", "loss", "answer_loss")
        }
    return StageRow(
        stage="backbone",
        seconds=None if last is None else last["seconds"],
        peak_gpu_bytes=peak_gpu_bytes(),
        samples_per_s=None if last is None else last["tokens_per_s"],
        sample="token",
        final_metrics={"stages": stages, "exact_match": [asdict(score) for score in scores]},
    )
