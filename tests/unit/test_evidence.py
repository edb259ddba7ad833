"""Merging audits by hand-made cases, and what an estimate of recall may claim."""

import math

import pytest

from forepage.errors import DependencyError, RequestError
from forepage.kv.evidence import RecallEstimate, merge_audit

INF = math.inf
BLOCK = 64
"""Entries of a block."""


def test_all_resident_has_full_recall() -> None:
    verdict = merge_audit([(9, 3.0), (4, 1.0), (70, 2.0)], [], topk=2)
    assert (verdict.num_evidence, verdict.num_evidence_resident) == (2, 2)
    assert verdict.evidence_recall == 1.0
    assert (verdict.missed_mass, verdict.recall_at_k, verdict.missing) == (0.0, 1.0, ())


def test_absent_entry_in_the_top_is_missed_with_its_mass() -> None:
    verdict = merge_audit([(0, 0.0), (1, -50.0)], [(7 * BLOCK, math.log(3))], topk=2)
    assert verdict.missed_mass == pytest.approx(0.75)
    assert dict(verdict.missing) == {7: pytest.approx(0.75)}
    assert (verdict.num_evidence, verdict.num_evidence_resident) == (2, 1)
    assert verdict.recall_at_k == 0.5


def test_absent_entries_below_the_top_are_not_missed() -> None:
    verdict = merge_audit([(300, 5.0), (301, 4.0)], [(3, 3.0)], topk=2)
    assert (verdict.recall_at_k, verdict.missed_mass) == (1.0, 0.0)


def test_evidence_is_one_percent_of_the_softmax() -> None:
    just_above, just_below = math.log(0.0102), math.log(0.0098)
    verdict = merge_audit([(0, 0.0)], [(BLOCK, just_above), (2 * BLOCK, just_below)], topk=3)
    assert verdict.num_evidence == 2  # of 1 / 1.02, 0.0102 / 1.02 = 1 % and less than 1 %
    assert [block for block, _ in verdict.missing] == [1], "what is no evidence is nothing to repair"
    assert verdict.missed_mass == pytest.approx(0.02 / 1.02), "but it is missed mass"


def test_missing_blocks_add_up_their_entries_by_falling_mass() -> None:
    verdict = merge_audit([], [(4 * BLOCK, 0.0), (9 * BLOCK + 5, 0.5), (4 * BLOCK + 63, 0.0)], topk=3)
    assert [block for block, _ in verdict.missing] == [4, 9]
    assert sum(mass for _, mass in verdict.missing) == pytest.approx(1.0)
    assert verdict.evidence_recall == 0.0


def test_equal_masses_are_ordered_by_block() -> None:
    verdict = merge_audit([], [(9 * BLOCK, 1.0), (2 * BLOCK, 1.0)], topk=2)
    assert [block for block, _ in verdict.missing] == [2, 9]


@pytest.mark.parametrize(("resident", "absent", "recall"), [(10, 700, 1.0), (700, 10, 0.5)])
def test_tie_at_the_last_place_goes_to_the_lower_entry(resident: int, absent: int, recall: float) -> None:
    verdict = merge_audit([(64, 2.0), (resident, 1.0)], [(absent, 1.0)], topk=2)
    assert verdict.recall_at_k == recall


def test_tie_between_absent_entries_goes_to_the_lower() -> None:
    verdict = merge_audit([(0, 2.0)], [(8 * BLOCK, 1.0), (5 * BLOCK, 1.0)], topk=2)
    assert [block for block, _ in verdict.missing] == [5]


def test_zeros_of_either_sign_are_a_tie() -> None:
    verdict = merge_audit([(1, -0.0), (130, 0.0)], [(70, -0.0), (128, 0.0)], topk=3)
    assert verdict.recall_at_k == pytest.approx(1 / 3)  # entries 1, 70 and 128
    assert [block for block, _ in verdict.missing] == [1, 2]


def test_all_scores_equal_are_taken_from_the_front() -> None:
    """The ReLU closed every head: the model takes the lowest 32 of those that are visible."""
    resident = [(entry, 0.0) for entry in range(16)] + [(entry, 0.0) for entry in range(128, 144)]
    absent = [(entry, -0.0) for entry in range(64, 96)]
    verdict = merge_audit(resident, absent, topk=32)
    assert (verdict.num_evidence, verdict.num_evidence_resident) == (32, 16)
    assert dict(verdict.missing) == {1: pytest.approx(0.5)}


def test_huge_scores_do_not_overflow() -> None:
    verdict = merge_audit([(0, 3e38)], [(1, 3e38), (64, -3e38)], topk=3)
    assert verdict.missed_mass == pytest.approx(0.5)


def test_padding_is_ignored_and_nothing_visible_is_no_miss() -> None:
    verdict = merge_audit([(-1, -INF), (-1, -INF)], [(0, -INF)], topk=4)
    assert verdict.evidence_recall is None
    assert (verdict.num_evidence, verdict.recall_at_k, verdict.missed_mass) == (0, 1.0, 0.0)


@pytest.mark.parametrize("bad", [(0, math.nan), (0, INF), (-1, 0.0)])
def test_what_is_no_score_or_no_entry_is_refused(bad: tuple[int, float]) -> None:
    with pytest.raises(RequestError, match="resident: "):
        merge_audit([bad], [], topk=1)
    with pytest.raises(RequestError, match="absent: "):
        merge_audit([], [bad], topk=1)


@pytest.mark.parametrize(
    ("resident", "absent"),
    [([(7, 1.0), (7, 2.0)], []), ([], [(7, 1.0), (9, 0.0), (7, 1.0)]), ([(7, 1.0)], [(7, 1.0)])],
)
def test_entry_named_twice_is_refused(
    resident: list[tuple[int, float]], absent: list[tuple[int, float]]
) -> None:
    with pytest.raises(RequestError, match="entries: 7 is named twice"):
        merge_audit(resident, absent, topk=1)


def test_topk_below_one_is_refused() -> None:
    with pytest.raises(RequestError, match="topk"):
        merge_audit([(0, 1.0)], [], topk=0)


def test_estimate_without_steps_claims_nothing() -> None:
    estimate = RecallEstimate()
    assert (estimate.mean, estimate.minimum, estimate.low95, estimate.num_steps) == (None, None, None, 0)


def test_estimate_counts_steps_without_evidence_apart() -> None:
    estimate = RecallEstimate()
    assert estimate.add_step(num_evidence=0, num_evidence_resident=0) is None
    assert estimate.add_step(num_evidence=4, num_evidence_resident=3) == 0.75
    assert (estimate.num_steps, estimate.num_without_evidence) == (1, 1)
    assert (estimate.mean, estimate.minimum) == (0.75, 0.75)


def test_estimate_weighs_steps_equally() -> None:
    estimate = RecallEstimate()
    estimate.add_step(num_evidence=100, num_evidence_resident=100)
    estimate.add_step(num_evidence=2, num_evidence_resident=1)
    assert estimate.mean == 0.75
    assert estimate.minimum == 0.5


@pytest.mark.parametrize(("steps", "low"), [(1, 0.2065), (10, 0.7225), (100, 0.9630)])
def test_estimate_of_perfect_steps_grows_with_their_number(steps: int, low: float) -> None:
    estimate = RecallEstimate()
    for _ in range(steps):
        estimate.add_step(num_evidence=50, num_evidence_resident=50)
    assert estimate.mean == 1.0
    assert estimate.low95 == pytest.approx(low, abs=1e-4)


@pytest.mark.parametrize(("evidence", "resident"), [(1, 2), (3, -1)])
def test_estimate_refuses_impossible_counts(evidence: int, resident: int) -> None:
    with pytest.raises(DependencyError, match="evidence entries"):
        RecallEstimate().add_step(num_evidence=evidence, num_evidence_resident=resident)
