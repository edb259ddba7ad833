"""Laws of choosing blocks and of changing a resident set."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forepage.errors import DependencyError
from forepage.kv.ids import BlockIdx, SequenceId
from forepage.kv.prefetch_plan import (
    PlanStamp,
    PrefetchPlan,
    ResidencyChange,
    choose_blocks,
    plan_residency,
)

STAMP = PlanStamp(SequenceId("s"), incarnation=1, interval=4)
SCORES = st.sampled_from([0.0, 0.25, 0.5, 0.51, 0.75, 1.0])  # few values: ties matter
BLOCKS = st.integers(0, 40).map(BlockIdx)
DESIRED = st.lists(st.tuples(BLOCKS, SCORES), max_size=40)
HELD = st.dictionaries(BLOCKS, SCORES, max_size=40)
TAIL = st.integers(0, 45).map(BlockIdx)
BUDGET = st.integers(0, 30)
SLACK = st.integers(1, 12)


@settings(deadline=None)
@given(st.lists(SCORES | st.just(math.nan), max_size=60), SCORES, BUDGET)
def test_choice_is_the_best_above_the_threshold(scores: list[float], threshold: float, budget: int) -> None:
    choice = choose_blocks(scores, threshold=threshold, budget_blocks=budget)
    above = {block for block, score in enumerate(scores) if score > threshold}
    assert choice.num_above_threshold == len(above)
    assert len(choice.blocks) == min(budget, len(above))
    assert set(choice.blocks) <= above
    assert choice.scores == tuple(scores[block] for block in choice.blocks)
    ranks = [(-score, block) for block, score in zip(choice.blocks, choice.scores, strict=True)]
    assert ranks == sorted(ranks)
    left = [(-scores[block], block) for block in above - set(choice.blocks)]
    assert not ranks or not left or ranks[-1] < min(left)
    PrefetchPlan(STAMP, choice.blocks, choice.scores, choice.num_above_threshold)  # accepts the order


@settings(deadline=None)
@given(DESIRED, HELD, TAIL, BUDGET, SLACK)
def test_change_keeps_the_budget_and_the_always_resident(
    desired: list[tuple[BlockIdx, float]],
    held: dict[BlockIdx, float],
    tail: BlockIdx,
    budget: int,
    slack: int,
) -> None:
    change = plan_residency(
        desired, held, always_resident_from=tail, budget_blocks=budget, slack_blocks=slack
    )
    keep, load, drop = set(change.keep), set(change.load), set(change.drop)
    assert len(keep) + len(load) + len(drop) == len(change.keep + change.load + change.drop)  # no repeats
    assert len(keep | load | drop) == len(keep) + len(load) + len(drop)
    assert len(keep | load) <= budget
    assert all(block < tail for block in keep | load | drop)
    assert keep | drop == {block for block in held if block < tail}
    assert load <= {block for block, _ in desired} - set(held)


@settings(deadline=None)
@given(DESIRED, HELD, TAIL, BUDGET, SLACK)
def test_waves_fit_and_end_at_the_desired_set(
    desired: list[tuple[BlockIdx, float]],
    held: dict[BlockIdx, float],
    tail: BlockIdx,
    budget: int,
    slack: int,
) -> None:
    change = plan_residency(
        desired, held, always_resident_from=tail, budget_blocks=budget, slack_blocks=slack
    )
    now = {block for block in held if block < tail}
    most = max(budget + slack, len(now))
    for wave in change.waves:
        assert wave.load or wave.drop
        assert len(wave.load) <= slack
        assert len(now) + len(wave.load) <= most
        assert not set(wave.load) & now
        now |= set(wave.load)
        assert set(wave.drop) <= now - set(change.keep) - set(change.load)
        now -= set(wave.drop)
        assert len(now) <= max(budget, 0)
    assert now == set(change.keep) | set(change.load)
    assert tuple(block for wave in change.waves for block in wave.load) == change.load
    assert tuple(block for wave in change.waves for block in wave.drop) == change.drop
    assert change.is_empty == (not change.load and not change.drop)


@settings(deadline=None)
@given(DESIRED, HELD, TAIL, BUDGET, SLACK)
def test_best_loads_first_and_worst_drops_first(
    desired: list[tuple[BlockIdx, float]],
    held: dict[BlockIdx, float],
    tail: BlockIdx,
    budget: int,
    slack: int,
) -> None:
    change = plan_residency(
        desired, held, always_resident_from=tail, budget_blocks=budget, slack_blocks=slack
    )
    best: dict[BlockIdx, float] = {}
    for block, score in desired:
        best[block] = max(score, best.get(block, score))
    for blocks in (change.keep, change.load):
        assert list(blocks) == sorted(blocks, key=lambda block: (-best[block], block))
    assert list(change.drop) == sorted(change.drop, key=lambda block: (held[block], block))
    chosen = set(change.keep) | set(change.load)
    left = [block for block in best if block < tail and block not in chosen]
    if chosen and left:
        worst_chosen = max((-best[block], block) for block in chosen)
        assert worst_chosen < min((-best[block], block) for block in left)


@settings(deadline=None)
@given(DESIRED, HELD, TAIL, BUDGET, SLACK, st.randoms(use_true_random=False))
def test_change_is_a_function_of_its_sets_and_settles(
    desired: list[tuple[BlockIdx, float]],
    held: dict[BlockIdx, float],
    tail: BlockIdx,
    budget: int,
    slack: int,
    rng: random.Random,
) -> None:
    def plan(asked: list[tuple[BlockIdx, float]], now: dict[BlockIdx, float]) -> ResidencyChange:
        return plan_residency(asked, now, always_resident_from=tail, budget_blocks=budget, slack_blocks=slack)

    change = plan(desired, held)
    shuffled, entries = list(desired), list(held.items())
    rng.shuffle(shuffled)
    rng.shuffle(entries)
    assert plan(shuffled, dict(entries)) == change
    reached = dict.fromkeys(change.keep + change.load, 1.0)
    assert plan(desired, reached).is_empty


@pytest.mark.parametrize(("budget", "slack"), [(-1, 4), (4, 0), (4, -2)])
def test_impossible_bounds_are_refused(budget: int, slack: int) -> None:
    with pytest.raises(DependencyError, match="residency"):
        plan_residency([], {}, always_resident_from=BlockIdx(9), budget_blocks=budget, slack_blocks=slack)


@pytest.mark.parametrize(
    ("blocks", "scores", "message"),
    [
        ((1, 2), (0.9,), "2 blocks with 1 scores"),
        ((1, 1), (0.9, 0.9), "named twice"),
        ((-1,), (0.9,), "negative"),
        ((1,), (math.nan,), "not finite"),
        ((1, 2), (0.8, 0.9), "falling score"),
        ((2, 1), (0.9, 0.9), "falling score"),
    ],
)
def test_plan_that_is_out_of_order_is_refused(
    blocks: tuple[int, ...], scores: tuple[float, ...], message: str
) -> None:
    with pytest.raises(DependencyError, match=message):
        PrefetchPlan(STAMP, tuple(map(BlockIdx, blocks)), scores, num_above_threshold=len(blocks))


def test_stamp_answers_only_its_own_question() -> None:
    assert STAMP.answers(PlanStamp(SequenceId("s"), 1, 4))
    assert not STAMP.answers(PlanStamp(SequenceId("s"), 1, 5))
    assert not STAMP.answers(PlanStamp(SequenceId("s"), 2, 4))
    assert not STAMP.answers(PlanStamp(SequenceId("t"), 1, 4))
