"""Intervals against published values and by simulation."""

import random

import pytest

from loadtest.quality.intervals import design_effect, mean_interval, paired_interval, percentile


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_mean_interval_is_wilsons(right: int, count: int, low: float, high: float) -> None:
    mean, *ends = mean_interval([1.0] * right + [0.0] * (count - right))
    assert mean == right / count
    assert ends == pytest.approx([low, high], abs=1e-4)


def test_mean_interval_of_partial_scores_holds_their_mean() -> None:
    mean, low, high = mean_interval([0.25, 0.75, 0.5, 0.5])
    assert mean == 0.5
    assert 0.0 < low < 0.5 < high < 1.0


def test_paired_interval_without_a_difference_is_not_certain() -> None:
    mean, low, high = paired_interval([0.0] * 800)
    assert mean == 0.0
    assert (low, high) == pytest.approx((-0.00346, 0.00346), abs=1e-5)


def test_paired_interval_is_bonett_and_prices() -> None:
    # 5 lost, 2 gained of 60: p21 = 3/62, p12 = 6/62
    mean, low, high = paired_interval([-1.0] * 5 + [1.0] * 2 + [0.0] * 53)
    spread = 1.959964 * ((3 / 62 + 6 / 62 - (3 / 62) ** 2) / 62) ** 0.5
    assert mean == pytest.approx(-3 / 60)
    assert (low, high) == pytest.approx((-3 / 62 - spread, -3 / 62 + spread), abs=1e-6)


@pytest.mark.parametrize(("loss", "gain"), [(0.02, 0.01), (0.1, 0.1), (0.2, 0.02)])
def test_paired_interval_covers_the_truth_in_nineteen_of_twenty(loss: float, gain: float) -> None:
    draw = random.Random(5)
    covered = 0
    for _ in range(600):
        sample = draw.choices([-1.0, 1.0, 0.0], weights=[loss, gain, 1 - loss - gain], k=200)
        _, low, high = paired_interval(sample)
        covered += low <= gain - loss <= high
    assert covered / 600 > 0.92


def test_questions_that_fail_together_count_as_fewer() -> None:
    scores = [1.0] * 8 + [0.0] * 8
    together = design_effect(scores, ["a"] * 8 + ["b"] * 8)
    apart = design_effect(scores, ["a", "b"] * 8)
    assert together == pytest.approx(16.0)
    assert apart == 1.0
    wide, narrow = mean_interval(scores, effect=8.0), mean_interval(scores)
    assert wide[1:] == pytest.approx(mean_interval([1.0, 0.0])[1:])
    assert wide[1] < narrow[1] < 0.5
    assert paired_interval(scores, effect=4.0)[1] < paired_interval(scores)[1]


def test_design_effect_is_one_where_it_cannot_be_known() -> None:
    assert design_effect([1.0, 0.0], ["a", "a"]) == 1.0
    assert design_effect([1.0, 1.0], ["a", "b"]) == 1.0


def test_clustered_interval_covers_where_the_plain_one_does_not() -> None:
    draw = random.Random(9)
    covered = {"plain": 0, "clustered": 0}
    for _ in range(400):
        groups = [number for number in range(25) for _ in range(16)]
        shares = [draw.choice([0.2, 0.9]) for _ in range(25)]
        scores = [float(draw.random() < shares[group]) for group in groups]
        for name, effect in (("plain", 1.0), ("clustered", design_effect(scores, groups))):
            _, low, high = mean_interval(scores, effect=effect)
            covered[name] += low <= 0.55 <= high
    assert covered["clustered"] / 400 > 0.9
    assert covered["plain"] / 400 < 0.8


def test_percentile_is_a_value_of_the_sample() -> None:
    assert percentile([0.5] + [1.0] * 99, 0.01) == 1.0
    assert percentile([0.5, 0.6] + [1.0] * 98, 0.01) == 0.6
    assert percentile([0.7], 0.01) == 0.7


def test_nothing_has_no_interval() -> None:
    for function in (mean_interval, paired_interval):
        with pytest.raises(ValueError, match="no "):
            function([])
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.01)
