"""Writes the measured differences into tests/README.md, between its two marks.

    cd tests && OMP_NUM_THREADS=1 python -m rigs.parity_table

Every number is the largest difference of any logit in that case; `test_model_parity` asserts the same cases.
"""

import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

from rigs.parity import ATOL, SUBJECTS

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- parity: begin -->\n", "<!-- parity: end -->\n"


def rows() -> Iterator[str]:
    """The table's lines, measured one by one."""
    yield "| text | case | largest difference | near-ties settled |"
    yield "|---|---|---|---|"
    for subject_case in SUBJECTS:
        subject = subject_case.build()
        for case in subject_case.cases:
            difference, ties = case.measure(subject)
            settled = f"{ties.settled} of {ties.selections:,}"
            line = f"| {subject_case.id} | {case.id} | {difference:.1e} | {settled} |"
            print(line, file=sys.stderr)
            if not difference <= ATOL:
                raise SystemExit(f"{subject_case.id}, {case.id}: {difference} is above {ATOL}")
            yield line


def main() -> None:
    """Measure, then replace what is between the marks."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    where = f"{platform.machine()}, {torch.get_num_threads()} thread(s), {versions}"
    table = "\n".join(("", f"Measured on {where}; allowed: {ATOL:.0e}.", "", *rows(), ""))
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}{table}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
