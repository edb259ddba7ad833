"""The run's figures: rows in the shape of our result files, the loss curve, and the exact-match table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from forepage.training.backbone.evaluation import Score, table
from forepage.training.backbone.journal import read_log
from forepage.training.results import StageRow, write_row

CURVE_FILE = "training.png"
TABLE_FILE = "exact_match.md"
FIGURES = ("kl", "kept", "evidence")


def write_report(folder: Path, configs: Mapping[str, Mapping[str, Any]], scores: Sequence[Score]) -> None:
    """Write training.json, training.png (if it can be drawn) and exact_match.md beside the log.

    A row a stage that has been trained at all; `configs` by stage. Scores belong to the last one.
    """
    log = read_log(folder)
    rows = [row for row in (_curriculum_row(log), _warm_up_row(log), _sparse_row(log)) if row is not None]
    if scores and rows:
        found = {"exact_match": [asdict(score) for score in scores]}
        rows[-1] = replace(rows[-1], final_metrics={**rows[-1].final_metrics, **found})
    for row in rows:
        write_row(folder, row, what="training of forepage-tiny's backbone", config=configs[row.stage])
    if scores:
        (folder / TABLE_FILE).write_text(table(scores) + "\n", encoding="utf-8")
    curve = [row for row in log if "loss" in row]
    if curve and can_draw():
        draw_curve(curve, folder / CURVE_FILE)


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


def _curriculum_row(log: Sequence[Mapping[str, Any]]) -> StageRow | None:
    rows = [row for row in log if "loss" in row and "phase" not in row]
    if not rows:
        return None
    stages = {row["name"]: _last(row) for row in rows}
    return _row("backbone", rows, {"stages": stages})


def _warm_up_row(log: Sequence[Mapping[str, Any]]) -> StageRow | None:
    rows = _phase(log, "indexer")
    if not rows:
        return None
    last = rows[-1]
    return StageRow(
        stage="warm-up",
        seconds=last["seconds"],
        peak_gpu_bytes=_peak(rows),
        samples_per_s=last["steps"] / max(last["seconds"], 1e-9),
        sample="step",
        final_metrics={key: last[key] for key in ("steps", *FIGURES)},
    )


def _sparse_row(log: Sequence[Mapping[str, Any]]) -> StageRow | None:
    rows = _phase(log, "sparse")
    if not rows:
        return None
    last = {**_last(rows[-1]), **{key: rows[-1][key] for key in FIGURES}}
    compared = {row["when"]: row for row in reversed(_phase(log, "comparison"))}
    sides = {when: _figures(row) for when, row in compared.items()}
    return replace(_row("sparse", rows, sides | last), seconds=rows[-1]["stage_seconds"])


def _row(stage: str, rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> StageRow:
    return StageRow(
        stage=stage,
        seconds=rows[-1]["seconds"],
        peak_gpu_bytes=_peak(rows),
        samples_per_s=rows[-1]["tokens_per_s"],
        sample="token",
        final_metrics=metrics,
    )


def _phase(log: Sequence[Mapping[str, Any]], phase: str) -> list[Mapping[str, Any]]:
    return [row for row in log if row.get("phase") == phase]


def _last(row: Mapping[str, Any]) -> dict[str, Any]:
    """Where a stage ended."""
    return {key: row[key] for key in ("step", "stage_seconds", "tokens_per_s", "loss", "answer_loss")}


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of a comparison."""
    return {key: value for key, value in row.items() if key not in ("phase", "when")}


def _peak(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """Over all calls that trained the stage; None without a GPU."""
    return max((row["peak_gpu_bytes"] for row in rows if row.get("peak_gpu_bytes")), default=None)
