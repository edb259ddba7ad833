"""training.json: one row a stage, kept while other stages come, replaced when the stage is run again."""

import json
from pathlib import Path

from forepage.training.results import StageRow, write_row


def row(stage: str, seconds: float) -> StageRow:
    return StageRow(stage, seconds, None, 2.0, "plan", {"recall": 0.5})


def test_stages_add_and_replace_their_rows(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    write_row(folder, row("dump", 1.0), what="w", config={"a": 1})
    write_row(folder, row("indexer", 2.0), what="w", config={"b": 2})
    write_row(folder, row("dump", 3.0), what="w", config={"a": 4})
    body = json.loads((folder / "training.json").read_text())
    assert [(one["stage"], one["seconds"]) for one in body["rows"]] == [("indexer", 2.0), ("dump", 3.0)]
    assert body["config"] == {"dump": {"a": 4}, "indexer": {"b": 2}}
    shape = {"what", "command", "commit", "date", "device", "ceilings", "config", "why", "rows"}
    assert set(body) == shape
    assert set(body["rows"][0]) == {
        "stage",
        "seconds",
        "peak_gpu_bytes",
        "samples_per_s",
        "sample",
        "final_metrics",
    }
