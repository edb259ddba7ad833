"""`python -m loadtest.throughput.join --out loadtest/results PART/throughput.json ...`: runs of one machine.

Contexts can be measured side by side, each on a GPU of the same host and into a folder of its own; this puts
their rows into one file, and makes its table and picture.
"""

import argparse
import json
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from loadtest.throughput.case import Arm
from loadtest.throughput.report import TABLES, write
from loadtest.throughput.rows import Row

ALIKE = ("what", "device", "commit", "config")
"""What parts must agree on: else their rows can't be compared."""


class JoinError(Exception):
    """The parts are not of one machine, one commit and one configuration."""


def main(arguments: Seq[str] | None = None) -> int:
    """Join and write; 1 when the parts don't belong together."""
    parser = argparse.ArgumentParser(prog="loadtest.throughput.join", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for throughput.json, .md and .png")
    parser.add_argument("parts", nargs="+", type=Path, help="throughput.json of each run")
    options = parser.parse_args(arguments)
    try:
        joined = join([json.loads(path.read_text(encoding="utf-8")) for path in options.parts])
    except JoinError as error:
        print(error)
        return 1
    write(options.out, joined)
    return 0


def join(parts: Seq[dict[str, Any]]) -> dict[str, Any]:
    """One result of several. Raises: JoinError."""
    first = parts[0]
    for part in parts[1:]:
        for name in ALIKE:
            if part[name] != first[name]:
                raise JoinError(f"the runs differ in {name}: {first[name]} and {part[name]}")
    rows = sorted((row for part in parts for row in part["rows"]), key=_place)
    commands = " && ".join(dict.fromkeys(part["command"] for part in parts))
    return first | {"command": commands, "date": max(part["date"] for part in parts), "rows": rows}


def _place(row: Row) -> tuple[int, int, int, int]:
    kinds, arms = list(TABLES), [arm.value for arm in Arm]
    return kinds.index(row["measures"]), row["context_tokens"], row["concurrency"], arms.index(row["arm"])


if __name__ == "__main__":
    raise SystemExit(main())
