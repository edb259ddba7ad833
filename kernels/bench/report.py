"""Rows of results.json, and the table and picture made from them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.case import Case, Ceiling

Row = dict[str, Any]


def result_row(
    case: Case,
    ceilings: Mapping[Ceiling, float],
    *,
    time_us: float,
    torch_us: float | None,
    other_us: float | None,
    error: float,
) -> Row:
    """One flat row: the time, and its share of whichever ceiling binds at this shape."""
    floors = {
        name: (case.flops if name in (Ceiling.BF16, Ceiling.FP8) else case.num_bytes) / ceilings[name] * 1e6
        for name in case.ceilings
    }
    binding = max(floors, key=floors.__getitem__)
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "dtype": case.dtype,
        "time_us": round(time_us, 2),
        "bytes": case.num_bytes,
        "flops": case.flops,
        "gb_per_s": round(case.num_bytes / time_us / 1e3, 1),
        "tflop_per_s": round(case.flops / time_us / 1e6, 1),
        "ceiling": binding.value,
        "ceiling_value": ceilings[binding],
        "share": round(floors[binding] / time_us, 3),
        "torch_us": None if torch_us is None else round(torch_us, 2),
        "other_us": None if other_us is None else round(other_us, 2),
        "other": case.other,
        "error": error,
    }


def table(rows: Sequence[Row], ceilings: Mapping[str, float]) -> str:
    """The rows as Markdown, ceilings first."""
    lines = ["| ceiling | measured |", "|---|---|"]
    lines += [f"| {name} | {value / 1e9:,.1f} G/s |" for name, value in ceilings.items()]
    lines += ["", "| kernel | shape | us | GB/s | TFLOP/s | share of ceiling | torch us | other us |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in rows:
        others = " | ".join(
            "" if row[key] is None else f"{row[key]:,.1f}" for key in ("torch_us", "other_us")
        )
        lines.append(
            f"| {row['kernel']} | {row['shape']} | {row['time_us']:,.1f} | {row['gb_per_s']:,.0f} "
            f"| {row['tflop_per_s']:,.0f} | {row['share']:.0%} of {row['ceiling']} | {others} |"
        )
    return "\n".join(lines) + "\n"


def write(folder: Path, name: str, result: Mapping[str, Any]) -> None:
    """`name`.json, .md and, where matplotlib is there, .png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table(result["rows"], result["ceilings"]))
    draw(folder / f"{name}.png", result["rows"])


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Share of the ceiling, a bar a case."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.34 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    labels = [f"{row['kernel']}: {row['shape']}" for row in rows]
    colours = [f"C{kernels.index(row['kernel'])}" for row in rows]
    bars = axes.barh(labels, [100 * row["share"] for row in rows], color=colours)
    axes.bar_label(bars, [f"{row['time_us']:,.1f} us" for row in rows], padding=3, fontsize=8)
    axes.set(xlabel="% of the ceiling that binds", xlim=(0, 115))
    axes.margins(y=0.005)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    figure.savefig(path, dpi=110)
