"""Laws of the audit's merge and of the recall estimate."""

import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from forepage.errors import RequestError
from forepage.kv.evidence import RecallEstimate, merge_audit
from forepage_kernels.select_topk import select_topk

Scored = list[tuple[int, float]]
"""Entries with their scores."""


@dataclass(frozen=True)
class Step:
    """The scores of one layer at one step, and which blocks were resident."""

    resident: Scored
    absent: Scored


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Few distinct scores (both zeros among them) or any: ties are common. Order and gaps are arbitrary."""
    scores = st.sampled_from([0.0, -0.0, 1.5, -2.0]) | st.floats(-30, 30, width=32)
    by_entry = draw(
        st.dictionaries(st.integers(0, 639), scores, max_size=80, min_size=draw(st.integers(0, 20)))
    )
    resident_blocks = draw(st.sets(st.integers(0, 9)))
    pairs = draw(st.permutations(list(by_entry.items())))
    return Step(
        resident=[pair for pair in pairs if pair[0] // 64 in resident_blocks],
        absent=[pair for pair in pairs if pair[0] // 64 not in resident_blocks],
    )


STEPS = steps()
TOPK = st.integers(1, 8) | st.integers(1, 100)


def model_top(pairs: Scored, topk: int) -> Scored:
    """What the model selects: falling score, equal ones from the lower entry."""
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:topk]


@settings(deadline=None)
@given(STEPS, TOPK)
def test_merge_equals_a_dense_ranking(step: Step, topk: int) -> None:
    verdict = merge_audit(step.resident, step.absent, topk=topk)
    top = model_top([*step.resident, *step.absent], topk)
    is_absent = np.isin([entry for entry, _ in top], [entry for entry, _ in step.absent])
    exps = np.exp(np.array([score for _, score in top], dtype=np.float64) - (top[0][1] if top else 0.0))
    probabilities = exps / exps.sum() if top else exps
    assert verdict.missed_mass == pytest.approx(probabilities[is_absent].sum(), abs=1e-9)
    assert verdict.recall_at_k == (np.mean(~is_absent) if top else 1.0)
    edge = np.abs(probabilities - 0.01) < 1e-9  # sums in another order may fall on either side
    evidence = probabilities >= 0.01
    blocks = np.array([entry // 64 for entry, _ in top], dtype=np.int64)
    missing = {block for block, _ in verdict.missing}
    assert set(blocks[is_absent & evidence & ~edge]) <= missing <= set(blocks[is_absent & (evidence | edge)])
    assert abs(verdict.num_evidence - evidence.sum()) <= edge.sum()
    assert abs(verdict.num_evidence_resident - (evidence & ~is_absent).sum()) <= edge.sum()


@settings(deadline=None)
@given(STEPS, TOPK)
def test_merge_takes_what_the_models_own_top_k_takes(step: Step, topk: int) -> None:
    """The kernel that selects in decode, over all entries in place, is the reference for ties."""
    logits = torch.full((1, 640), -math.inf)
    for entry, score in [*step.resident, *step.absent]:
        logits[0, entry] = score
    selected = {entry for entry in select_topk(logits, topk)[0].tolist() if entry >= 0}
    num_resident = len(selected & {entry for entry, _ in step.resident})
    verdict = merge_audit(step.resident, step.absent, topk=topk)
    assert verdict.recall_at_k == (num_resident / len(selected) if selected else 1.0)
    absent_blocks = {entry // 64 for entry in selected & {entry for entry, _ in step.absent}}
    assert {block for block, _ in verdict.missing} <= absent_blocks


@settings(deadline=None)
@given(STEPS, TOPK, st.randoms(use_true_random=False))
def test_order_and_padding_of_the_input_change_nothing(step: Step, topk: int, rng: random.Random) -> None:
    verdict = merge_audit(step.resident, step.absent, topk=topk)
    shuffled, others = [*step.resident, (-1, -math.inf)], [*step.absent, (3, -math.inf)]
    rng.shuffle(shuffled)
    rng.shuffle(others)
    assert merge_audit(shuffled, others, topk=topk) == verdict


@settings(deadline=None)
@given(STEPS, TOPK)
def test_each_side_may_be_cut_to_its_own_top(step: Step, topk: int) -> None:
    whole = merge_audit(step.resident, step.absent, topk=topk)
    assert merge_audit(model_top(step.resident, topk), model_top(step.absent, topk), topk=topk) == whole


@settings(deadline=None)
@given(STEPS, TOPK)
def test_verdict_is_consistent(step: Step, topk: int) -> None:
    verdict = merge_audit(step.resident, step.absent, topk=topk)
    masses = [mass for _, mass in verdict.missing]
    assert 0 <= verdict.num_evidence_resident <= verdict.num_evidence <= min(topk, 100)
    assert 0 <= verdict.missed_mass <= 1
    assert sum(masses) <= verdict.missed_mass + 1e-9
    assert all(mass >= 0.01 for mass in masses)
    assert masses == sorted(masses, reverse=True)
    assert len({block for block, _ in verdict.missing}) == len(masses)
    assert bool(masses) == (verdict.num_evidence_resident < verdict.num_evidence)


@settings(deadline=None)
@given(STEPS, TOPK, st.data())
def test_an_entry_named_twice_is_refused(step: Step, topk: int, data: st.DataObject) -> None:
    known = [*step.resident, *step.absent]
    assume(known)
    again = (data.draw(st.sampled_from(known))[0], 1.0)
    with pytest.raises(RequestError, match="named twice"):
        merge_audit([*step.resident, again], step.absent, topk=topk)
    with pytest.raises(RequestError, match="named twice"):
        merge_audit(step.resident, [*step.absent, again], topk=topk)


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
