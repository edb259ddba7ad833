"""shadow.json, and the table and picture made from it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtest.result_file import result_file
from loadtest.shadow.checked import Checked, rows_of

WHAT = "What served answers said of their evidence, beside a second pass with every block resident"
COLUMNS = (
    ("suite", ""),
    ("length_tokens", ","),
    ("arm", ""),
    ("n", ","),
    ("not_checked", ","),
    ("steps", ","),
    ("evidence_recall", ".4f"),
    ("evidence_recall_estimate", ".4f"),
    ("largest_difference", ".4f"),
    ("evidence_recall_steps", ".4f"),
    ("evidence_recall_p01", ".3f"),
    ("evidence_recall_audited", ".4f"),
    ("golden_recall", ".4f"),
    ("recall_at_k", ".3f"),
    ("missed_mass", ".4f"),
    ("missed_mass_reported", ".4f"),
    ("missed_attention", ".4f"),
    ("audited_share", ".2f"),
)


def result_of(
    checked: Sequence[Checked], *, command: str, device: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole file."""
    reasons = sorted({one.why_not for one in checked if one.why_not is not None})
    rows = [{name: _rounded(value) for name, value in row.items()} for row in rows_of(checked)]
    why = {"ceilings": "recall has no hardware ceiling"}
    if reasons:
        why["not_checked"] = "; ".join(reasons)
    return result_file(WHAT, command=command, device=dict(device), config=config, why=why, rows=rows)


def write(folder: Path, result: Mapping[str, Any], checked: Sequence[Checked]) -> None:
    """shadow.json, .md and .png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "shadow.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "shadow.md").write_text(markdown(result), encoding="utf-8")
    draw(folder / "shadow.png", checked)


def markdown(result: Mapping[str, Any]) -> str:
    """The table."""
    lines = ["| " + " | ".join(name for name, _ in COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in result["rows"]:
        cells = ("-" if row[name] is None else format(row[name], form) for name, form in COLUMNS)
        lines.append("| " + " | ".join(cells) + " |")
    head = f"# {result['what']}\n\n`{result['command']}`, {result['date']}, {result['device']}.\n\n"
    return head + "\n".join(lines) + "\n"


def draw(path: Path, checked: Sequence[Checked]) -> None:
    """Each answer: what it reported across, what the second pass found upwards."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    axes.plot([0, 1], [0, 1], color="0.8", zorder=0)
    least = 1.0
    for arm in dict.fromkeys(one.arm for one in checked):
        points = [
            (one.reported_recall, one.evidence_recall)
            for one in checked
            if one.arm == arm and one.reported_recall is not None and one.evidence_recall is not None
        ]
        if points:
            across, up = zip(*points, strict=True)
            least = min(least, *across, *up)
            axes.scatter(across, up, s=18, alpha=0.6, label=f"{arm} ({len(points)})")
    limits = (least - 0.05, 1.0 + 0.1 * (1.05 - least))
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    axes.set_xlabel("evidence recall that the answer estimated, from audits")
    axes.set_ylabel("evidence recall by brute force (all steps, all layers)")
    if axes.collections:
        axes.legend(loc="upper left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
