"""quality.json, and the Markdown table and picture made from it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtest.quality.answers import Answer
from loadtest.quality.arms import Arm
from loadtest.quality.figures import Row, depth_rows_of, rows_of
from loadtest.result_file import result_file

WHAT = "Accuracy, evidence recall and KV footprint by suite, length and arm"
WHAT_ABLATION = "What each setting of the lookahead does to accuracy, evidence recall and KV footprint"
COLUMNS = (
    ("suite", ""),
    ("length_tokens", ","),
    ("arm", ""),
    ("n", ","),
    ("accuracy", ".1%"),
    ("delta_to_full", "+.1%"),
    ("footprint_flash", ".1%"),
    ("kv_footprint", ".1%"),
    ("c4_footprint", ".1%"),
    ("evidence_recall", ".3f"),
    ("evidence_recall_p01", ".3f"),
    ("recall_at_k", ".3f"),
    ("missed_mass", ".3f"),
    ("late_plans", ".1%"),
    ("escalations", ".2f"),
)
FACTOR = (("factor", ""), ("value", ""))
"""What an ablation's rows have before the others."""

INTERVAL_OF = {"accuracy": ("ci_low", "ci_high"), "delta_to_full": ("delta_ci_low", "delta_ci_high")}


def result_of(
    answers: Sequence[Answer], *, command: str, device: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole file: what every result file has, then the rows."""
    result = result_file(
        WHAT,
        command=command,
        device=dict(device),
        config=config,
        why={"ceilings": "accuracy has no hardware ceiling"},
        rows=rows_of(answers),
    )
    return {**result, "depths": depth_rows_of(answers)}


def ablation_of(
    answers_by_value: Mapping[tuple[str, str], Sequence[Answer]],
    *,
    command: str,
    device: Mapping[str, Any],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """ablation.json: the rows of every (factor, value), each compared to `full` of its own run."""
    everything = [answer for answers in answers_by_value.values() for answer in answers]
    result = result_of(everything, command=command, device=device, config=config)
    rows = [
        {"factor": factor, "value": value, **row}
        for (factor, value), answers in answers_by_value.items()
        for row in rows_of(answers)
    ]
    return {**result, "what": WHAT_ABLATION, "rows": rows, "depths": []}


def write(folder: Path, result: Mapping[str, Any], *, name: str = "quality", picture: bool = True) -> None:
    """`name`.json, .md and, for one set of arms, .png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown(result), encoding="utf-8")
    if picture:
        draw(folder / f"{name}.png", result["rows"])


def markdown(result: Mapping[str, Any]) -> str:
    """All questions first, then those whose evidence is older than the last 8K tokens, then by depth."""
    first, *others = str(result["command"]).split(" && ")
    more = f" and {len(others)} more commands (in the JSON file)" if others else ""
    parts = [f"# {result['what']}\n", f"`{first}`{more}, {result['date']}, {result['device']}.\n"]
    for subset, title in (
        ("all", "All questions"),
        ("outside_last_8k", "Evidence outside the last 8K tokens"),
    ):
        rows = [row for row in result["rows"] if row["subset"] == subset]
        if rows:
            parts.append(f"## {title}\n\n{_table(rows)}")
    if result["depths"]:
        parts.append("## By depth of the evidence\n\n" + _depth_table(result["depths"]))
    return "\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    columns = (*(FACTOR if "factor" in rows[0] else ()), *COLUMNS)
    lines = ["| " + " | ".join(name for name, _ in columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(_cell(row, name, form) for name, form in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(row: Row, name: str, form: str) -> str:
    value = row[name]
    if value is None:
        return "-"
    text = format(value, form)
    if name in INTERVAL_OF:
        low, high = (format(row[end], form) for end in INTERVAL_OF[name])
        text += f" ({low} to {high})"
    return text


def _depth_table(rows: Sequence[Row]) -> str:
    lines = [
        "| length_tokens | arm | depth | n | accuracy | evidence_recall | text_evidence_recall |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        recalls = [
            "-" if row[name] is None else f"{row[name]:.3f}"
            for name in ("evidence_recall", "text_evidence_recall")
        ]
        lines.append(
            f"| {row['length_tokens']:,} | {row['arm']} | {row['depth_low']:.1f}-{row['depth_high']:.1f} "
            f"| {row['n']} | {row['accuracy']:.1%} | {' | '.join(recalls)} |"
        )
    return "\n".join(lines) + "\n"


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Accuracy by length, a panel a suite, a line an arm, bars the 95 % intervals."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["subset"] == "all"]
    suites = list(dict.fromkeys(row["suite"] for row in shown))
    columns = min(4, max(1, len(suites)))
    lines = -(-len(suites) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.8 * max(1, lines) + 0.5), layout="constrained")
    panels = figure.subplots(max(1, lines), columns, squeeze=False, sharey=True).flatten()
    for panel, suite in zip(panels, suites, strict=False):
        for number, arm in enumerate(Arm):
            points = [row for row in shown if row["suite"] == suite and row["arm"] == arm.value]
            if points:
                _line(panel, points, arm, number)
        panel.set_title(suite, fontsize=9)
        panel.set_xscale("log", base=2)
        panel.set_ylim(-0.03, 1.03)
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=7)
    figure.suptitle("accuracy, with its 95 % interval, by tokens of the document", fontsize=10)
    for panel in panels[len(suites) :]:
        panel.set_visible(False)
    handles = {line.get_label(): line for panel in panels for line in panel.containers}
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=len(Arm), fontsize=8
        )
    figure.savefig(path, dpi=110)


def _line(panel: Any, points: Sequence[Row], arm: Arm, number: int) -> None:
    points = sorted(points, key=lambda row: int(row["length_tokens"]))
    middle = [row["accuracy"] for row in points]
    panel.errorbar(
        [row["length_tokens"] * 1.03 ** (number - 2) for row in points],  # side by side
        middle,
        yerr=[
            [at - row["ci_low"] for at, row in zip(middle, points, strict=True)],
            [row["ci_high"] - at for at, row in zip(middle, points, strict=True)],
        ],
        marker="o",
        markersize=3,
        linewidth=1.2,
        capsize=2,
        color=f"C{number}",
        label=arm.value,
    )
