"""One run as a JSON file, a Markdown table and a picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtest.load.figures import Row, rows_of
from loadtest.load.sample import Sample
from loadtest.load.shapes import Shape
from loadtest.result_file import result_file

WHAT = "How long users of a running endpoint wait, and what paging does, under load"
COLUMNS = (
    ("subset", ""),
    ("length_tokens", ","),
    ("requests", ","),
    ("answered", ","),
    ("refused", ","),
    ("failed", ","),
    ("accuracy", ".1%"),
    ("ttft_p50_ms", ",.0f"),
    ("ttft_p95_ms", ",.0f"),
    ("itl_p50_ms", ",.1f"),
    ("itl_p99_ms", ",.1f"),
    ("tokens_per_s", ",.1f"),
    ("cached_share", ".1%"),
    ("evidence_recall", ".3f"),
    ("kv_footprint", ".1%"),
    ("footprint_flash", ".1%"),
    ("prefetch_ms_mean", ",.1f"),
    ("prefetch_ms_max", ",.1f"),
    ("late_plans", ".1%"),
    ("escalations", ".2f"),
)


def result_of(
    shape: Shape,
    samples: Sequence[Sample],
    *,
    seconds: float,
    command: str,
    device: Mapping[str, Any],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """The whole file: what every result file has, then the rows, then users and tokens over time."""
    return result_file(
        WHAT,
        command=command,
        device=dict(device),
        config={
            **config,
            "shape": shape.what,
            "stages": [[stage.seconds, stage.users] for stage in shape.stages],
            "length_tokens": shape.length_tokens,
            "num_documents": shape.num_documents,
            "think_s": shape.think_s,
            "seconds": round(seconds, 3),
        },
        why={"ceilings": "what users see over HTTP; the server's own limits are in the other result files"},
        rows=rows_of(shape.name, samples, seconds=seconds),
    )


def write(
    folder: Path, name: str, result: Mapping[str, Any], shape: Shape, samples: Sequence[Sample]
) -> None:
    """`name`.json, .md and .png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown(result), encoding="utf-8")
    draw(folder / f"{name}.png", shape, samples)


def markdown(result: Mapping[str, Any]) -> str:
    """A head and a table."""
    lines = [
        f"# {result['what']}: {result['config']['shape']}\n",
        f"`{result['command']}`, {result['date']}, {result['device'] or 'device not named (--device)'}.\n",
        "| " + " | ".join(name for name, _ in COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(_cell(row, *column) for column in COLUMNS) + " |" for row in result["rows"]),
    ]
    return "\n".join(lines) + "\n"


def _cell(row: Row, name: str, form: str) -> str:
    return "-" if row[name] is None else format(row[name], form)


def draw(path: Path, shape: Shape, samples: Sequence[Sample]) -> None:
    """TTFT over time with the number of users, gaps between pieces, footprint, recall, prefetch latency."""
    from matplotlib.figure import Figure

    whole = [one for one in samples if one.error is None]
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    _draw_ttft(panels[0], shape, samples)
    gaps = sorted(gap * 1e3 for one in whole for gap in one.gaps_s)
    if gaps:
        panels[1].plot(gaps, [(place + 1) / len(gaps) for place in range(len(gaps))])
        panels[1].set_xscale("log")
    panels[1].set(title="time between pieces", xlabel="ms", ylabel="share below")
    for name, label in (("kv_footprint", "KV footprint"), ("evidence_recall_mean", "evidence recall")):
        points = [(one.sent_s, one.residency[name]) for one in whole if one.residency.get(name) is not None]
        if points:
            panels[2].scatter(*_columns(points), s=12, label=label)
    panels[2].set(title="residency of each answer", xlabel="sent, s", ylim=(-0.03, 1.05))
    if panels[2].collections:
        panels[2].legend(fontsize=8)
    latency = [
        (one.sent_s, one.residency["prefetch_latency_ms_mean"])
        for one in whole
        if one.residency.get("prefetch_latency_ms_mean") is not None
    ]
    panels[3].set(title="prefetch, boundary to commit", xlabel="sent, s", ylabel="ms, mean of an answer")
    if latency:
        panels[3].scatter(*_columns(latency), s=12, color="C3")
    else:
        panels[3].set(xticks=[], yticks=[])
        panels[3].text(0.5, 0.5, "no plan was committed: nothing was paged", ha="center", va="center")
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.suptitle(f"{shape.name}: {shape.what}", fontsize=10)
    figure.savefig(path, dpi=110)


def _draw_ttft(panel: Any, shape: Shape, samples: Sequence[Sample]) -> None:
    answered = [(one.sent_s, one.ttft_s * 1e3) for one in samples if one.ttft_s is not None]
    panel.scatter(*_columns(answered), s=12, label="time to first token")
    failed = [(one.sent_s, one.total_s * 1e3) for one in samples if one.error is not None]
    if failed:
        panel.scatter(*_columns(failed), s=16, marker="x", color="C3", label="refused or failed")
    panel.set(title="time to first token, and users", xlabel="sent, s", ylabel="ms")
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=8)
    users = panel.twinx()
    at_s, counts = [0.0], [shape.stages[0].users]
    for stage in shape.stages:
        at_s.append(at_s[-1] + stage.seconds)
        counts.append(stage.users)
    users.step(at_s, counts, color="grey", alpha=0.5)
    users.set_ylim(0, 1.3 * max(counts))
    users.set_ylabel("users", color="grey")


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
