"""Our transformer equals the independent implementation in `transformers`, fp32: every case of `rigs.parity`.

The measured differences are in tests/README.md; `rigs.parity_table` writes them.
"""

from functools import lru_cache

import pytest

from rigs.parity import ATOL, SUBJECTS, Case, Subject, SubjectCase

MAX_TIE_SHARE = 2e-3
"""Of a case's selections: ties that decide more than this would hide a fault."""
EACH = [
    pytest.param(subject, case, id=f"{subject.id}: {case.id}")
    for subject in SUBJECTS
    for case in subject.cases
]


@lru_cache(maxsize=1)
def built(case_id: str) -> Subject:
    """Kept while the cases of one subject follow one another."""
    return next(case for case in SUBJECTS if case.id == case_id).build()


@pytest.mark.parametrize(("subject_case", "case"), EACH)
def test_logits_equal_the_oracles(subject_case: SubjectCase, case: Case) -> None:
    subject = built(subject_case.id)
    assert 0.5 < subject.expected.std() < 2
    difference, ties = case.measure(subject)
    assert difference <= ATOL
    assert ties.settled <= MAX_TIE_SHARE * ties.selections
