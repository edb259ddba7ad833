"""The table of other systems' failures names tests that exist."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
TABLE = TESTS / "fault" / "peers.md"
HOME = "fault/test_peer_failures.py"
NAMED = sorted(set(re.findall(r"`((?:[\w/]+\.py::)?test_\w+)`", TABLE.read_text(encoding="utf-8"))))


def place_of(name: str) -> tuple[Path, str]:
    """File and function of a test as the table writes it."""
    file, _, function = name.rpartition("::")
    file = file or HOME
    return TESTS / (file if "/" in file else f"fault/{file}"), function


@pytest.mark.parametrize("name", NAMED)
def test_every_named_test_exists(name: str) -> None:
    path, function = place_of(name)
    assert re.search(rf"^\s*(async )?def {function}\(", path.read_text(encoding="utf-8"), re.MULTILINE)


def test_every_failure_has_a_row_with_a_test() -> None:
    rows = [
        line for line in TABLE.read_text(encoding="utf-8").splitlines() if re.match(r"\| (\d|[ABC]\d)", line)
    ]
    numbers = {row.split("|")[1].strip() for row in rows}
    assert {str(number) for number in range(1, 20)} | {f"A{number}" for number in range(1, 16)} <= numbers
    assert all("`" in row.rsplit("|", 2)[1] for row in rows)
