"""Laws of the audit's merge and of the recall estimate."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forepage.kv.evidence import RecallEstimate, merge_audit
from forepage.kv.ids import BlockIdx

SCORES = st.floats(-30, 30, width=32)
RESIDENT = st.lists(SCORES, max_size=40)
ABSENT = st.lists(st.tuples(st.integers(0, 9).map(BlockIdx), SCORES), max_size=40)
TOPK = st.integers(1, 50)


@settings(deadline=None)
@given(RESIDENT, ABSENT, TOPK)
def test_merge_equals_a_dense_ranking(
    resident: list[float], absent: list[tuple[BlockIdx, float]], topk: int
) -> None:
    verdict = merge_audit(resident, absent, topk=topk)
    scores = np.array([*(score for _, score in absent), *resident], dtype=np.float64)
    is_absent = np.arange(len(scores)) < len(absent)
    top = np.lexsort((~is_absent, -scores))[:topk]  # falling score, absent first
    probabilities = np.exp(scores[top] - scores.max()) if len(top) else np.zeros(0)
    probabilities = probabilities / probabilities.sum() if len(top) else probabilities
    assert verdict.missed_mass == pytest.approx(probabilities[is_absent[top]].sum(), abs=1e-9)
    assert verdict.recall_at_k == (np.mean(~is_absent[top]) if len(top) else 1.0)
    edge = np.abs(probabilities - 0.01) < 1e-9  # sums in another order may fall on either side
    evidence = probabilities >= 0.01
    assert abs(verdict.num_evidence - evidence.sum()) <= edge.sum()
    assert abs(verdict.num_evidence_resident - (evidence & ~is_absent[top]).sum()) <= edge.sum()


@settings(deadline=None)
@given(RESIDENT, ABSENT, TOPK, st.randoms(use_true_random=False))
def test_order_and_padding_of_the_input_change_nothing(
    resident: list[float], absent: list[tuple[BlockIdx, float]], topk: int, rng: random.Random
) -> None:
    verdict = merge_audit(resident, absent, topk=topk)
    shuffled, others = [*resident, -math.inf], [*absent, (BlockIdx(3), -math.inf)]
    rng.shuffle(shuffled)
    rng.shuffle(others)
    assert merge_audit(shuffled, others, topk=topk) == verdict


@settings(deadline=None)
@given(RESIDENT, ABSENT, TOPK)
def test_each_side_may_be_cut_to_its_own_top(
    resident: list[float], absent: list[tuple[BlockIdx, float]], topk: int
) -> None:
    best_resident = sorted(resident, reverse=True)[:topk]
    best_absent = sorted(absent, key=lambda pair: (-pair[1], pair[0]))[:topk]
    whole = merge_audit(resident, absent, topk=topk)
    assert merge_audit(best_resident, best_absent, topk=topk) == whole


@settings(deadline=None)
@given(RESIDENT, ABSENT, TOPK)
def test_verdict_is_consistent(
    resident: list[float], absent: list[tuple[BlockIdx, float]], topk: int
) -> None:
    verdict = merge_audit(resident, absent, topk=topk)
    masses = [mass for _, mass in verdict.missing]
    assert 0 <= verdict.num_evidence_resident <= verdict.num_evidence <= min(topk, 100)
    assert 0 <= verdict.missed_mass <= 1
    assert sum(masses) == pytest.approx(verdict.missed_mass)
    assert masses == sorted(masses, reverse=True)
    assert len({block for block, _ in verdict.missing}) == len(masses)
    assert bool(masses) == (verdict.recall_at_k < 1)


@settings(deadline=None)
@given(RESIDENT, ABSENT, TOPK)
def test_a_tie_never_hides_a_miss(
    resident: list[float], absent: list[tuple[BlockIdx, float]], topk: int
) -> None:
    """Whoever wins the ties in truth, no more was missed than we report."""
    favoured = [np.nextafter(score, math.inf) for score in resident]  # residents win every tie
    reported = merge_audit(resident, absent, topk=topk)
    assert merge_audit(favoured, absent, topk=topk).recall_at_k >= reported.recall_at_k


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 100), st.floats(0, 1)), min_size=1, max_size=60))
def test_estimate_is_ordered_and_in_range(steps: list[tuple[int, float]]) -> None:
    estimate = RecallEstimate()
    for evidence, share in steps:
        estimate.add_step(num_evidence=evidence, num_evidence_resident=round(evidence * share))
    assert estimate.num_steps + estimate.num_without_evidence == len(steps)
    low, least, mean = estimate.low95, estimate.minimum, estimate.mean
    if low is None or least is None or mean is None:
        assert estimate.num_steps == 0
        return
    assert 0 <= low <= mean <= 1
    assert 0 <= least <= mean + 1e-12


@pytest.mark.parametrize("num_steps", [2, 5, 20, 80])
@pytest.mark.parametrize("miss_share", [0.3, 0.1, 0.04, 0.01])
@pytest.mark.parametrize("miss_depth", [1.0, 0.3])
def test_low95_is_below_the_truth_in_95_of_100_runs(
    num_steps: int, miss_share: float, miss_depth: float
) -> None:
    """Steps miss `miss_depth` of their evidence with probability `miss_share`, else nothing."""
    rng = random.Random(f"{num_steps} {miss_share} {miss_depth}")
    truth = 1 - miss_share * miss_depth
    runs, covered = 400, 0
    for _ in range(runs):
        estimate = RecallEstimate()
        for _ in range(num_steps):
            kept = 10 - round(10 * miss_depth) * (rng.random() < miss_share)
            estimate.add_step(num_evidence=10, num_evidence_resident=kept)
        assert estimate.low95 is not None
        covered += estimate.low95 <= truth
    assert covered >= 0.95 * runs
