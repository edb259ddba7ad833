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
from rigs.parity_ranks import CASES, rank_differences

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- parity: begin -->\n", "<!-- parity: end -->\n"
RANKS_BEGIN, RANKS_END = "<!-- ranks: begin -->\n", "<!-- ranks: end -->\n"


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


def rank_rows() -> Iterator[str]:
    """The lines of the table of split models: the worst rank's."""
    yield "| split over | case | largest difference |"
    yield "|---|---|---|"
    for case in CASES:
        by_rank = rank_differences(case)
        for how in by_rank[0]:
            difference = max(differences[how] for differences in by_rank)
            line = f"| {case.id} | {how} | {difference:.1e} |"
            print(line, file=sys.stderr)
            if not difference <= ATOL:
                raise SystemExit(f"{case.id}, {how}: {difference} is above {ATOL}")
            yield line


def main() -> None:
    """Measure, then replace what is between the marks; with `ranks`, only the table of split models."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    where = f"{platform.machine()}, {torch.get_num_threads()} thread(s), {versions}"
    measured = f"Measured on {where}; allowed: {ATOL:.0e}."
    if "ranks" not in sys.argv[1:]:
        _replace(BEGIN, END, [measured, "", *rows()])
    _replace(RANKS_BEGIN, RANKS_END, [measured, "", *rank_rows()])


def _replace(begin: str, end: str, lines: list[str]) -> None:
    before, _, rest = README.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    text = "\n".join(("", *lines, ""))
    README.write_text(f"{before}{begin}{text}{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
