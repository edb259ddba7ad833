"""From answers to quality.json: figures by hand, reasons for what is missing, files that are whole."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loadtest.quality.__main__ import app
from loadtest.quality.answers import Answer, AnswerFile
from loadtest.quality.figures import depth_rows_of, rows_of
from loadtest.quality.report import draw, result_of

ROW = (
    "suite length_tokens arm subset n accuracy ci_low ci_high delta_to_full delta_ci_low delta_ci_high "
    "kv_footprint footprint_flash c4_footprint evidence_recall evidence_recall_p01 audited_share "
    "golden_recall recall_at_k missed_mass late_plans escalations why"
)
"""What every row must have."""


def answer(number: int, arm: str, score: float, **fields: Any) -> Answer:
    values: dict[str, Any] = {
        "key": f"mrcr/8192/seed-{number // 2}/{number}",
        "arm": arm,
        "suite": "mrcr",
        "length_tokens": 8192,
        "document": f"seed-{number // 2}",
        "kind": "mrcr_2",
        "score": score,
        "reply": "",
        "depth": number / 10,
        "outside_tail": number < 3,
        "evidence_blocks": [1, 2],
        "byte_tokens": 800,
        "prompt_tokens": 800,
        "completion_tokens": 40,
        "seconds": 0.1,
    }
    return Answer(**{**values, **fields})


def paged(number: int, arm: str, score: float, *recalls: float, **report: Any) -> Answer:
    residency = {
        "kv_footprint": 0.5,
        "footprint_flash": 0.2,
        "c4_footprint": 0.1,
        "chosen_blocks_mean": 3.0,
        "evidence_recall_steps": list(recalls),
        "resident_block_idx": [2, 3],
        "recall_at_k_mean": 0.75,
        "missed_mass_mean": 0.25,
        "audited_steps": 2,
        "paged_steps": 40,
        "intervals": 4,
        "late_plans": 1,
        "escalations": 0,
        "moves_to_exact": 0,
        "full_by_size": False,
    }
    return answer(number, arm, score, residency={**residency, **report})


FULL = [answer(number, "full", 1.0, residency={"kv_footprint": 1.0}) for number in range(4)]


def row(rows: list[dict[str, Any]], arm: str, subset: str = "all") -> dict[str, Any]:
    (found,) = (one for one in rows if one["arm"] == arm and one["subset"] == subset)
    return found


def test_rows_have_every_column_and_figures_of_their_answers() -> None:
    ours = [paged(0, "guarded", 1.0, 1.0, 0.5), paged(1, "guarded", 0.0, 1.0), paged(2, "guarded", 1.0)]
    rows = rows_of([*FULL, *ours])
    assert all(set(one) >= set(ROW.split()) for one in rows)
    found = row(rows, "guarded")
    assert (found["n"], found["documents"], found["errors"]) == (3, 2, 0)
    assert found["accuracy"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["delta_to_full"] == pytest.approx(-1 / 3, abs=1e-4)
    assert found["delta_ci_low"] < -1 / 3 < found["delta_ci_high"]
    assert found["evidence_recall"] == pytest.approx(2.5 / 3, abs=1e-4)
    assert found["evidence_recall_p01"] == 0.5
    assert found["text_evidence_recall"] == 0.5
    assert found["audited_share"] == 0.05
    assert found["late_plans"] == 0.25
    assert (found["kv_footprint"], found["footprint_flash"], found["c4_footprint"]) == (0.5, 0.2, 0.1)
    assert found["golden_recall"] is None
    assert "golden_recall" in found["why"]


def test_full_has_no_difference_and_no_recall_and_says_why() -> None:
    found = row(rows_of(FULL), "full")
    assert found["delta_to_full"] is None
    assert found["evidence_recall"] is None
    assert "nothing is absent" in found["why"]


def test_subsets_tell_old_evidence_from_recent() -> None:
    rows = rows_of([*FULL, *(paged(number, "lookahead", float(number == 3)) for number in range(4))])
    assert row(rows, "lookahead", "outside_last_8k")["accuracy"] == 0.0
    assert row(rows, "lookahead", "outside_last_8k")["n"] == 3
    assert row(rows, "lookahead", "inside_last_8k")["accuracy"] == 1.0
    assert row(rows, "full", "inside_last_8k")["n"] == 1


def test_unaudited_unpaired_and_unreported_figures_say_why() -> None:
    alone = row(rows_of([paged(0, "lookahead", 1.0)]), "lookahead")
    assert "no audited step had evidence" in alone["why"]
    assert "no question was answered in both arms" in alone["why"]
    foreign = row(rows_of([answer(0, "full", 1.0)]), "full")
    assert foreign["kv_footprint"] is None
    assert "no usage.forepage" in foreign["why"]


def test_text_recall_needs_byte_tokens() -> None:
    other = paged(0, "lookahead", 1.0)
    found = row(
        rows_of([answer(0, "lookahead", 1.0, prompt_tokens=200, residency=other.residency)]), "lookahead"
    )
    assert found["text_evidence_recall"] is None
    assert "not bytes" in found["why"]


def test_failed_requests_count_as_wrong_and_are_named() -> None:
    found = row(rows_of([answer(0, "full", 0.0, error="500: x"), answer(1, "full", 1.0)]), "full")
    assert (found["n"], found["errors"], found["accuracy"]) == (2, 1, 0.5)


def test_depths_are_tenths_of_the_context() -> None:
    rows = depth_rows_of(
        [paged(number, "guarded", 1.0, 1.0) for number in range(4)] + [answer(9, "full", 0.0, depth=1.0)]
    )
    assert [(one["arm"], one["depth_low"]) for one in rows] == [
        ("full", 0.9), ("guarded", 0.0), ("guarded", 0.1), ("guarded", 0.2), ("guarded", 0.3),
    ]  # fmt: skip
    assert rows[1]["evidence_recall"] == 1.0


def test_report_command_writes_all_three_files(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "a.jsonl")
    for one in [*FULL, *(paged(number, "guarded", 1.0, 1.0) for number in range(4))]:
        file.append(one)
    file.close()
    arguments = [
        "report",
        str(tmp_path / "a.jsonl"),
        "--out",
        str(tmp_path / "r"),
        "--device",
        '{"gpu": "none"}',
    ]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, ran.output
    result = json.loads((tmp_path / "r" / "quality.json").read_text())
    assert {"what", "command", "commit", "date", "device", "ceilings", "config", "rows"} <= set(result)
    assert result["device"] == {"gpu": "none"}
    table = (tmp_path / "r" / "quality.md").read_text()
    assert "| mrcr | 8,192 | guarded | 4 | 100.0% (51.0% to 100.0%) | +0.0%" in table
    assert "Evidence outside the last 8K tokens" in table
    assert (tmp_path / "r" / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_ablation_puts_runs_side_by_side(tmp_path: Path) -> None:
    runs = []
    for steps, score in ((16, 1.0), (128, 0.0)):
        file = AnswerFile(tmp_path / f"{steps}.jsonl")
        for one in [*FULL, *(paged(number, "lookahead", score, 1.0) for number in range(4))]:
            file.append(one)
        file.close()
        runs.append(f"interval_steps={steps}:{tmp_path / f'{steps}.jsonl'}")
    ran = CliRunner().invoke(app, ["ablation", *runs, "--out", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    rows = json.loads((tmp_path / "ablation.json").read_text())["rows"]
    found = {(one["factor"], one["value"], one["arm"]): one for one in rows if one["subset"] == "all"}
    assert found["interval_steps", "16", "lookahead"]["delta_to_full"] == 0.0
    assert found["interval_steps", "128", "lookahead"]["delta_to_full"] == -1.0
    assert "| factor | value | suite |" in (tmp_path / "ablation.md").read_text()
    wrong = CliRunner().invoke(app, ["ablation", "interval_steps:x", "--out", str(tmp_path)])
    assert wrong.exit_code != 0


def test_picture_of_nothing_is_still_one(tmp_path: Path) -> None:
    draw(tmp_path / "empty.png", [])
    assert (tmp_path / "empty.png").exists()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["run", "--out", "a.jsonl", "--suite", "ruler_nothing"], "no such suite: ruler_nothing"),
        (["run", "--out", "a.jsonl", "--longbench", "absent.json"], "absent.json"),
        (["report", "absent.jsonl", "--out", "r", "--device", "{"], "absent.jsonl"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code != 0
    assert why in ran.output + repr(ran.exception)


def test_result_names_the_commit_or_why_not() -> None:
    result = result_of(FULL, command="x", device={}, config={})
    assert result["commit"] or "commit" in result["why"]
