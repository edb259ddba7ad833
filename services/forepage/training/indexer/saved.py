"""The trained indexer's files, side by side: tensors, the config that serving reads, the curve, a table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forepage.model.indexer_tensors import PREFIX, write_tensors
from forepage.model.memory_indexer import WEIGHTS_NAME
from forepage.model.spec import MEMORY_INDEXER_CONFIG
from forepage.training.indexer.calibration import Calibration, LengthFigures
from forepage.training.indexer.config import IndexerTrainingConfig

CURVE_JSON, CURVE_PNG, CURVE_TABLE = "calibration.json", "calibration.png", "calibration.md"


def stored_tensors(tensors: Mapping[str, Tensor], layers: Sequence[int], *, bf16: bool) -> dict[str, Tensor]:
    """Those of these c4 indices, as they are stored."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    wanted = tuple(f"{PREFIX}.l{layer}." for layer in layers)
    return {name: value.to(dtype) for name, value in tensors.items() if name.startswith(wanted)}


def write_indexer(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: IndexerTrainingConfig,
    calibration: Calibration,
    target_layers: Sequence[int],
) -> None:
    """memory_indexer.safetensors and memory_indexer.json, for `MemoryIndexer.load`."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = [target_layers[place] for place in calibration.layers]
    write_tensors(folder / WEIGHTS_NAME, stored_tensors(tensors, layers, bf16=config.fit.store_bf16))
    recall = min(row.evidence_recall for row in calibration.figures)
    body = {
        "target_layers": layers,
        "heads": config.fit.heads,
        "rank": config.fit.rank,
        "threshold": calibration.threshold,
        "calibration": {
            "budget_blocks": calibration.budget_blocks,
            "interval_steps": config.interval,
            "recent_tokens": config.recent_tokens,
            "evidence_recall": recall,
        },
    }
    (folder / MEMORY_INDEXER_CONFIG).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


def write_curve(
    folder: Path, calibration: Calibration, points: Sequence[Mapping[str, float]], head: Mapping[str, Any]
) -> None:
    """calibration.json, .md and .png. Needs matplotlib."""
    body = {**head, "calibration": asdict(calibration), "rows": list(points)}
    (folder / CURVE_JSON).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    (folder / CURVE_TABLE).write_text(table(calibration), encoding="utf-8")
    _draw(points, calibration, folder / CURVE_PNG)


def table(calibration: Calibration) -> str:
    """Markdown: a length a row."""
    reached = "" if calibration.reached else "not "
    columns = ["length", "texts", "plans", "evidence recall", "its p01", "far", "random", "precision"]
    columns += ["blocks (p99)", "of", "oracle"]
    lines = [
        f"Threshold {calibration.threshold:.4g}, budget {calibration.budget_blocks} blocks, "
        f"layers at places {list(calibration.layers)}; the recall asked for was {reached}reached.",
        "",
        "On the plans that it was chosen on: that the recall is the one asked for is by construction, and",
        "new texts may give less. With few texts at a length its row says little. `random` is the far recall",
        "that as many blocks chosen blindly have on average.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    lines += [f"| {' | '.join(_columns(row))} |" for row in calibration.figures]
    return "\n".join(lines) + "\n"


def _columns(row: LengthFigures) -> list[str]:
    return [
        f"{row.length_tokens:,}",
        f"{row.texts}",
        f"{row.plans}",
        f"{row.evidence_recall:.4f}",
        f"{row.evidence_recall_p01:.3f}",
        f"{row.far_recall:.4f}",
        f"{row.blocks / row.candidates:.4f}",
        f"{row.precision:.3f}",
        f"{row.blocks:.1f} ({row.blocks_p99:.0f})",
        f"{row.candidates:.1f}",
        f"{row.oracle_blocks:.1f}",
    ]


def _draw(points: Sequence[Mapping[str, float]], calibration: Calibration, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for length in sorted({int(point["length_tokens"]) for point in points}):
        mine = [point for point in points if point["length_tokens"] == length]
        axes.plot(
            [point["blocks"] for point in mine],
            [point["evidence_recall"] for point in mine],
            label=f"{length:,} tokens",
        )
    for row in calibration.figures:
        axes.plot(row.blocks, row.evidence_recall, "ko", markersize=4)
    axes.set_xlabel("blocks a plan (dots: the calibrated choice)")
    axes.set_ylabel("evidence recall")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
