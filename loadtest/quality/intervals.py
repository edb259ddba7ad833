"""95 % intervals of scores in 0..1 and of paired differences; both hold for partial scores too.

Questions on one document are not independent. Where they agree more than chance would have it (the design
effect), both intervals are as wide as those of so many fewer questions.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def design_effect(values: Sequence[float], groups: Sequence[Hashable]) -> float:
    """Variance of the mean with whole groups as the sample, over that of independent values; at least 1.

    1 where it can't be known: a single group, or values that are all equal.
    Source: L. Kish, Survey Sampling (1965), with the usual G / (G - 1).
    """
    mean = math.fsum(values) / len(values)
    alone = math.fsum((value - mean) ** 2 for value in values)
    sums: dict[Hashable, float] = defaultdict(float)
    for value, group in zip(values, groups, strict=True):
        sums[group] += value - mean
    if len(sums) < 2 or alone == 0.0:
        return 1.0
    together = math.fsum(one * one for one in sums.values()) * len(sums) / (len(sums) - 1)
    return max(1.0, together / alone)


def mean_interval(scores: Sequence[float], *, effect: float = 1.0) -> tuple[float, float, float]:
    """Mean and Wilson's interval. A score in 0..1 varies at most as a coin with its mean: it errs wide.

    Raises: ValueError without scores.  Source: E. B. Wilson, JASA 22 (1927).
    """
    count = len(scores)
    if not count:
        raise ValueError("no scores")
    mean = math.fsum(scores) / count
    count_alone = count / effect
    z2 = Z_95 * Z_95
    centre = mean + z2 / (2 * count_alone)
    spread = Z_95 * math.sqrt(mean * (1 - mean) / count_alone + z2 / (4 * count_alone * count_alone))
    low, high = (centre - spread) / (1 + z2 / count_alone), (centre + spread) / (1 + z2 / count_alone)
    return mean, max(0.0, min(low, mean)), min(1.0, max(high, mean))


def paired_interval(differences: Sequence[float], *, effect: float = 1.0) -> tuple[float, float, float]:
    """Mean paired difference (-1..1) and its interval.

    Bonett and Price's: one pair is added that gained and one that lost, so that no discordant pair at all
    does not look like certainty (n = 800: -0.35 to +0.35 points). For partial scores the same two are added.
    Raises: ValueError without pairs.  Source: D. G. Bonett, R. M. Price, J. Educ. Behav. Stat. 37 (2012).
    """
    if not differences:
        raise ValueError("no pairs")
    count = len(differences) + 2
    centre = math.fsum(differences) / count
    square = (math.fsum(one * one for one in differences) + 2) / count
    spread = Z_95 * math.sqrt(max(0.0, square - centre * centre) / count * effect)
    return math.fsum(differences) / len(differences), max(-1.0, centre - spread), min(1.0, centre + spread)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which at most this share of them lies. Raises: ValueError without values."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
