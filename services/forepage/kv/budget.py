"""How many blocks a sequence keeps because of their score, where neither its request nor the settings say."""

from itertools import pairwise

POINTS = ((32, 8), (128, 16), (256, 24), (512, 36), (1024, 52), (2048, 90), (4096, 128))
"""Blocks of a sequence, and its budget: what loadtest/results/quality.md was measured at, 8K to 1M tokens."""


def budget_for(num_blocks: int) -> int:
    """Blocks of score for a sequence of so many; between the points on a line, past the last as its share."""
    first, last = POINTS[0], POINTS[-1]
    if num_blocks <= first[0]:
        return first[1]
    for (low, low_budget), (high, high_budget) in pairwise(POINTS):
        if num_blocks <= high:
            return low_budget + (high_budget - low_budget) * (num_blocks - low) // (high - low)
    return last[1] * num_blocks // last[0]
