"""throughput.json, and the Markdown tables and picture made from it; written again after every row."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtest.throughput.case import Arm
from loadtest.throughput.measure import Phase
from loadtest.throughput.rows import Row

Columns = tuple[tuple[str, str], ...]
"""Name in the row, and how it is formatted."""
PREFILL_COLUMNS: Columns = (
    ("context_tokens", ","),
    ("arm", ""),
    ("concurrency", ","),
    ("prompt_tokens", ","),
    ("prefill_chunk_tokens", ","),
    ("prefill_share", ".0%"),
    ("itl_p50_ms_before", ",.2f"),
    ("itl_p99_ms_before", ",.2f"),
    ("itl_p50_ms_during", ",.2f"),
    ("itl_p99_ms_during", ",.2f"),
    ("itl_p99_ms_after", ",.2f"),
    ("itl_p50_during_vs_before", ".2f"),
    ("itl_p99_during_vs_before", ".2f"),
    ("tokens_per_s", ",.1f"),
    ("tokens_per_s_during", ",.1f"),
    ("prefill_tokens_per_s", ",.0f"),
    ("prefill_blocks_finished", ","),
    ("prefill_blocks_stored", ","),
)
MOVES_COLUMNS: Columns = (
    ("context_tokens", ","),
    ("arm", ""),
    ("concurrency", ","),
    ("guests", ","),
    ("rounds", ","),
    ("moves_left", ","),
    ("moves_returned", ","),
    ("moves_per_s", ",.2f"),
    ("move_ms_left", ",.1f"),
    ("move_ms_returned", ",.1f"),
    ("bytes_dropped_per_move", ",.0f"),
    ("bytes_loaded_per_move", ",.0f"),
    ("prefill_tokens_recomputed", ","),
    ("tokens_compared", ","),
    ("tokens_equal", ","),
    ("tokens_per_s", ",.1f"),
    ("itl_p50_ms", ",.2f"),
    ("itl_p99_ms", ",.2f"),
)
DECODE_COLUMNS: Columns = (
    ("context_tokens", ","),
    ("arm", ""),
    ("phase", ""),
    ("early_share", ".0%"),
    ("paging", ""),
    ("concurrency", ","),
    ("concurrency_vs_full", ".2f"),
    ("tokens_per_s", ",.1f"),
    ("tokens_per_s_vs_full", ".2f"),
    ("itl_p50_ms", ",.2f"),
    ("itl_p99_ms", ",.2f"),
    ("itl_p99_vs_frozen", ".2f"),
    ("ttft_ms", ",.0f"),
    ("gpu_kv_bytes_c4", ",.0f"),
    ("gpu_kv_bytes_index", ",.0f"),
    ("gpu_kv_bytes_other", ",.0f"),
    ("host_bytes_per_sequence", ",.0f"),
    ("prefetch_ms_predict", ",.2f"),
    ("prefetch_ms_load", ",.2f"),
    ("prefetch_ms_wait", ",.2f"),
    ("boundary_to_commit_steps_p99", ",.0f"),
    ("stall_share", ".2%"),
    ("late_plans", ".1%"),
    ("demand_bytes_per_token", ",.0f"),
    ("limited_by", ""),
    ("host_concurrency", ","),
    ("host_concurrency_2tb", ","),
)


TABLES: dict[str, tuple[str, Columns]] = {
    "decode": ("Decoding", DECODE_COLUMNS),
    "prefill": ("Beside a long prompt", PREFILL_COLUMNS),
    "moves": ("From full to paged and back", MOVES_COLUMNS),
}
"""By what a row measures: a heading and the columns of its table."""


def write(folder: Path, result: Mapping[str, Any]) -> None:
    """throughput.json, .md and .png in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    result = {**result, "rows": with_ratios(result["rows"])}
    (folder / "throughput.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "throughput.md").write_text(markdown(result), encoding="utf-8")
    draw(folder / "throughput.png", result["rows"])


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Rows about decoding also say how they compare with `full` at their context, alone or all that fit."""
    full = {
        (row["context_tokens"], row["batch1"]): row
        for row in rows
        if _measures(row) == "decode" and row["arm"] == Arm.FULL
    }
    return [
        row | _ratios(row, full.get((row["context_tokens"], row["batch1"])))
        if _measures(row) == "decode"
        else row
        for row in rows
    ]


def _ratios(row: Row, full: Row | None) -> Row:
    ratios: Row = {}
    for name in ("concurrency", "tokens_per_s"):
        ours, theirs = row[name], full and full[name]
        ratios[f"{name}_vs_full"] = ours / theirs if ours and theirs else None
    missing = [name for name, ratio in ratios.items() if ratio is None]
    why = {name: reason for name, reason in row.get("why", {}).items() if name not in ratios}
    return ratios | {"why": why | dict.fromkeys(missing, "`full` was not measured here, or this was not")}


def markdown(result: Mapping[str, Any]) -> str:
    """A head, and a table for each kind of row; `-` is a figure whose reason is in the JSON file."""
    lines = [
        f"# {result['what']}\n",
        f"`{result['command']}`, {result['date']}, {result['device']}.\n",
        f"{result['config']['notes']}\n",
    ]
    for measures, (heading, columns) in TABLES.items():
        rows = [row for row in result["rows"] if _measures(row) == measures]
        lines += _table(heading, columns, rows) if rows else []
    return "\n".join(lines) + "\n"


def _measures(row: Row) -> str:
    """What the row is about; of older files all are about decoding."""
    return str(row.get("measures", "decode"))


def _table(heading: str, columns: Columns, rows: Sequence[Row]) -> list[str]:
    return [
        f"## {heading}\n",
        "| " + " | ".join(name for name, _ in columns) + " |",
        "|---" * len(columns) + "|",
        *("| " + " | ".join(_cell(row, *column) for column in columns) + " |" for row in rows),
        "",
    ]


def _cell(row: Row, name: str, form: str) -> str:
    return "-" if row.get(name) is None else format(row[name], form)


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Of the rows about decoding: tokens a second and concurrency by context, an arm a line, and batch 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    shown = [row for row in rows if _measures(row) == "decode" and _is_drawn(row)]
    for panel, name, batch1, title in zip(
        figure.subplots(1, 3),
        ("concurrency", "tokens_per_s", "tokens_per_s"),
        (False, False, True),
        ("sequences that fit", "tokens/s, all sequences", "tokens/s, batch 1"),
        strict=True,
    ):
        _draw_arms(panel, [row for row in shown if row["batch1"] == batch1], name)
        panel.set(title=title, xlabel="context, tokens")
        panel.grid(alpha=0.3)
    if figure.axes[0].lines:
        figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _is_drawn(row: Row) -> bool:
    """One point an arm and context: of guarded sequences the steady one, paged as asked for."""
    return row.get("phase") != Phase.EARLY and row.get("paging") != "as shipped"


def _draw_arms(panel: Any, rows: Sequence[Row], name: str) -> None:
    """An arm a line, side by side: equal ones would hide each other."""
    measured = [row for row in rows if row[name] is not None]
    for number, arm in enumerate(Arm):
        points = sorted((row["context_tokens"], row[name]) for row in measured if row["arm"] == arm)
        if not points:
            continue
        at = [tokens * 1.02 ** (number - 2) for tokens, _ in points]
        panel.plot(at, [value for _, value in points], marker="o", color=f"C{number}", label=arm)
    contexts = sorted({row["context_tokens"] for row in measured})
    if contexts:
        panel.set_xscale("log", base=2)
        panel.set_xticks(contexts, [f"{tokens / 1024:g}K" for tokens in contexts])
        panel.minorticks_off()
        panel.set_xlim(contexts[0] / 1.3, contexts[-1] * 1.3)
        panel.set_ylim(0, 1.08 * max(row[name] for row in measured))
