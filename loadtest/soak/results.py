"""reliability.json: a row a fault; each run adds its own. Table and picture are made from the file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtest.result_file import result_file

NAME = "reliability"
WHAT = "What was promised of each fault, and what was seen"
COLUMNS = (
    "fault",
    "target",
    "promised",
    "outcome",
    "recovery_s",
    "wrong_tokens",
    "lost_tokens",
    "leaked_blocks",
    "requests",
)
Row = Mapping[str, Any]


def write(folder: Path, rows: Sequence[Row], *, command: str, device: str, config: Mapping[str, Any]) -> None:
    """Put these rows of one device in place of earlier ones of the same faults, and draw the file anew."""
    path = folder / f"{NAME}.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    marked = [{**row, "device": device} for row in rows]
    new = {_key(row) for row in marked}
    kept = [row for row in earlier.get("rows", []) if _key(row) not in new]
    commands = dict.fromkeys([*str(earlier.get("command", "")).split(" && "), command])
    result = result_file(
        WHAT,
        command=" && ".join(one for one in commands if one),
        device=sorted({str(row["device"]) for row in (*kept, *marked)}),
        config=earlier.get("config", {}) | {f"{device}: {command}": dict(config)},
        why={"ceilings": "promises have no hardware ceiling"},
        rows=[*kept, *marked],
    )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(folder)


def draw(folder: Path) -> None:
    """The Markdown table, and where matplotlib is there the picture, from the JSON file."""
    result = json.loads((folder / f"{NAME}.json").read_text(encoding="utf-8"))
    (folder / f"{NAME}.md").write_text(markdown(result), encoding="utf-8")
    try:
        _picture(folder / f"{NAME}.png", result["rows"])
    except ImportError:
        return


def markdown(result: Mapping[str, Any]) -> str:
    """The table, and below it what single rows have more."""
    columns = ("device", *COLUMNS)
    commands = "".join(f"- `{command}`\n" for command in str(result["command"]).split(" && "))
    head = f"# {result['what']}\n\n{result['date']}, written by\n\n{commands}\n"
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in result["rows"]]
    more = [
        f"- {row['fault']} ({row['device']}): "
        + ", ".join(f"{name} {value}" for name, value in extra.items())
        for row in result["rows"]
        if (extra := {name: row[name] for name in row if name not in (*columns, "why")})
    ]
    return head + "\n".join(lines) + "\n" + ("\n" + "\n".join(more) + "\n" if more else "")


def _key(row: Row) -> tuple[str, ...]:
    return str(row["fault"]), str(row["target"]), str(row["device"])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _picture(path: Path, rows: Sequence[Row]) -> None:
    """How long each fault was felt."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["recovery_s"] is not None]
    figure = Figure(figsize=(8, 0.32 * max(4, len(shown)) + 1), layout="constrained")
    panel = figure.subplots()
    names = [f"{row['target']}: {row['fault']}" for row in shown]
    kept = ["C0" if row["outcome"] == "kept" else "C3" for row in shown]
    panel.barh(range(len(shown)), [row["recovery_s"] for row in shown], color=kept)
    panel.set_yticks(range(len(shown)), names, fontsize=7)
    panel.invert_yaxis()
    panel.set_xlabel("seconds until served as before (red: a promise was broken)", fontsize=8)
    panel.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
