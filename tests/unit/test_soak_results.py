"""reliability.json: each run puts its rows in place of earlier ones; no folder of the machine is in it."""

import json
from pathlib import Path
from typing import Any

import pytest

from loadtest.soak.__main__ import RESULTS, told_arguments
from loadtest.soak.results import NAME, markdown, write


def row(fault: str, recovery_s: float) -> dict[str, Any]:
    return {
        "fault": fault,
        "target": "worker",
        "promised": "it goes on",
        "outcome": "kept",
        "recovery_s": recovery_s,
        "wrong_tokens": 0,
        "lost_tokens": 0,
        "leaked_blocks": 0,
        "requests": 1,
    }


def written(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / f"{NAME}.json").read_text())
    return result


def test_a_fault_that_is_measured_again_replaces_its_row_alone(tmp_path: Path) -> None:
    write(tmp_path, [row("killed", 1.0), row("cut off", 2.0)], command="first", device="CPU", config={})
    write(tmp_path, [row("killed", 3.0)], command="second", device="CPU", config={})
    write(tmp_path, [row("killed", 4.0)], command="second", device="GPU", config={})
    result = written(tmp_path)
    assert [(one["device"], one["fault"], one["recovery_s"]) for one in result["rows"]] == [
        ("CPU", "cut off", 2.0),
        ("CPU", "killed", 3.0),
        ("GPU", "killed", 4.0),
    ]
    assert result["command"] == "first && second"
    assert (tmp_path / f"{NAME}.md").read_text() == markdown(result)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["run", "--seeded", "--out", "/srv/x", "--factor", "4"], ["run", "--seeded", "--factor", "4"]),
        (["faults", "tests/fault", "--out=/srv/x"], ["faults", "tests/fault"]),
        (["run", "--out"], ["run"]),
    ],
)
def test_the_command_that_is_told_names_no_folder_of_the_machine(given: list[str], told: list[str]) -> None:
    assert told_arguments(given) == told


def test_the_committed_file_names_no_folder_of_a_machine_and_its_table_is_its_own() -> None:
    result = written(RESULTS)
    for word in json.dumps(result).replace('"', " ").replace(":", " ").split():
        assert not word.startswith("/"), word
    assert (RESULTS / f"{NAME}.md").read_text() == markdown(result)
