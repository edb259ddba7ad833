"""The throughput bench over real processes: every arm on a small model, and the shape of what it writes."""

import json
from pathlib import Path

from loadtest.throughput import moves, prefill
from loadtest.throughput.__main__ import main
from loadtest.throughput.case import Arm

OPTIONS = (
    "--model tiny --device cpu --contexts 8192 --kv-bytes 30000000 --footprint 0.25 --recent-tokens 512 "
    "--slack-blocks 2 --interval-steps 4 --answer-tokens 512 --max-sequences 2 --warm-tokens 2 "
    "--window-tokens 6 --window-s 0 --early-tokens 4"
)
COLUMNS = (
    "context_tokens arm batch1 index_placement kv_budget_bytes experts_stored concurrency ttft_ms "
    "tokens_per_s itl_p50_ms itl_p99_ms gpu_kv_bytes_c4 gpu_kv_bytes_index gpu_kv_bytes_other "
    "host_bytes_per_sequence "
    "prefetch_ms_predict prefetch_ms_queue prefetch_ms_load prefetch_ms_wait boundary_to_commit_steps_p99 "
    "stall_share late_plans itl_p99_vs_frozen demand_bytes_per_token limited_by"
)


def test_every_arm_decodes_its_history_and_leaves_a_whole_row(tmp_path: Path) -> None:
    arenas = set(Path("/dev/shm").glob("forepage-throughput-*"))
    assert main(["--out", str(tmp_path), *OPTIONS.split()]) == 0
    assert set(Path("/dev/shm").glob("forepage-throughput-*")) <= arenas
    result = json.loads((tmp_path / "throughput.json").read_text())
    assert {"what", "command", "commit", "date", "device", "ceilings", "config", "rows"} <= set(result)
    [shipped] = [row for row in result["rows"] if row["paging"] == "as shipped"]
    assert (shipped["arm"], shipped["batch1"], shipped["phase"]) == ("guarded", True, None)
    assert shipped["gpu_kv_bytes_c4"] > 0
    asked = [row for row in result["rows"] if row is not shipped]
    early = [row for row in asked if row["phase"] == "early"]
    assert [(row["arm"], row["batch1"]) for row in early] == [("guarded", True), ("guarded", False)]
    assert all(row["why"]["itl_p99_vs_frozen"] for row in early)
    assert all(0.0 <= row["early_share"] <= 1.0 for row in early)
    rows = {(row["arm"], row["batch1"]): row for row in asked if row["phase"] != "early"}
    assert set(rows) == {(arm.value, batch1) for arm in Arm for batch1 in (True, False)}
    assert len(result["rows"]) == 10 + len(early) + 1
    for (arm, batch1), row in rows.items():
        assert set(COLUMNS.split()) <= set(row)
        assert {name for name, value in row.items() if value is None} == set(row["why"])
        assert row["concurrency"] == (1 if batch1 else 2)
        assert row["tokens_per_s"] > 0
        assert row["concurrency_vs_full"] == 1.0
        assert row["tokens_per_s_vs_full"] == row["tokens_per_s"] / rows["full", batch1]["tokens_per_s"]
        assert (row["demand_bytes_per_token"] > 0) == (arm in ("demand", "exact"))
        whole, keys = rows["full", batch1]["gpu_kv_bytes_c4"], rows["full", batch1]["gpu_kv_bytes_index"]
        assert (row["gpu_kv_bytes_c4"] < whole) == (arm != "full")
        assert (row["gpu_kv_bytes_index"] < keys) == (arm in ("lookahead", "guarded"))
    assert any(row["prefetch_ms_load"] for row in result["rows"])
    paged = [row for row in asked if row["arm"] != "full" and row["phase"] != "early"]
    assert all(row["boundary_to_commit_steps_p50"] <= row["boundary_to_commit_steps_p99"] for row in paged)
    assert all(row["prefetch_ms_queue"] >= 0 and row["stall_share"] >= 0 for row in paged)
    assert all((row["itl_p99_vs_frozen"] is None) == (row["arm"] == "full") for row in rows.values())
    assert (tmp_path / "throughput.md").read_text().count("\n| 8,192 |") == 13
    assert (tmp_path / "throughput.png").stat().st_size > 10_000


def test_a_prompt_beside_decodes_leaves_its_row_among_the_others(tmp_path: Path) -> None:
    earlier_row = {"context_tokens": 1, "arm": "full", "batch1": True, "concurrency": 1, "tokens_per_s": 1.0}
    earlier = {"command": "before", "rows": [earlier_row]}
    (tmp_path / "throughput.json").write_text(json.dumps(earlier))
    options = (
        "--model tiny --device cpu --contexts 2048 --arms lookahead --kv-bytes 30000000 --footprint 0.25 "
        "--recent-tokens 512 --slack-blocks 2 --interval-steps 4 --answer-tokens 512 --sequences 1 "
        "--warm-tokens 2 --window-tokens 6 --window-s 0 --prompt-tokens 1100 --chunk-tokens 256 --add"
    )
    assert prefill.main(["--out", str(tmp_path), *options.split()]) == 0
    result = json.loads((tmp_path / "throughput.json").read_text())
    kept, row = result["rows"]
    assert earlier_row.items() <= kept.items()
    assert row["measures"] == "prefill"
    assert set(prefill.COLUMNS) <= set(row)
    assert row["why"].keys() == {name for name, value in row.items() if value is None}
    assert row["itl_p99_during_vs_before"] == row["itl_p99_ms_during"] / row["itl_p99_ms_before"]
    assert row["tokens_per_s_during"] > 0
    assert row["prefill_tokens_per_s"] > 0
    assert 0 <= row["prefill_blocks_stored"] <= row["prefill_blocks_finished"] <= 4
    tables = (tmp_path / "throughput.md").read_text()
    assert tables.count("\n| 2,048 | lookahead | 1 | 1,100 | 256 | 45% |") == 1
    assert "## Decoding" in tables


def test_sequences_move_to_paged_and_back_and_say_what_full_says(tmp_path: Path) -> None:
    options = (
        "--model tiny --device cpu --contexts 3072 --arms exact --footprint 0.25 --recent-tokens 256 "
        "--slack-blocks 1 --interval-steps 8 --answer-tokens 800 --sequences 3 --warm-tokens 2 "
        "--guest-tokens 4 --rounds 1 --compared-tokens 12"
    )
    assert moves.main(["--out", str(tmp_path), *options.split()]) == 0
    (row,) = json.loads((tmp_path / "throughput.json").read_text())["rows"]
    assert set(moves.COLUMNS) <= set(row)
    assert row["why"] == {}
    assert row["guests"] >= 1
    assert row["moves_left"] == row["moves_returned"] >= 1
    assert row["moves_per_s"] > 0 < row["move_ms_returned"]
    assert row["bytes_loaded_per_move"] >= row["bytes_dropped_per_move"] > 0
    assert row["prefill_tokens_recomputed"] == 0
    assert row["tokens_equal"] == row["tokens_compared"] >= 36
    assert "## From full to paged and back" in (tmp_path / "throughput.md").read_text()
