"""Where a plan's blocks come from: the memory indexer, or a baseline that must do with as many blocks.

The baselines answer one question of the quality report: is it the prediction that helps, or just that many
blocks? So each takes exactly as many blocks as the indexer would have, and only which ones differs.
"""

from enum import StrEnum
from random import Random

from forepage.kv.ids import BlockIdx
from forepage.kv.prefetch_plan import BlockChoice


class PlanSource(StrEnum):
    """Who says which blocks a paged sequence keeps."""

    MEMORY_INDEXER = "memory_indexer"
    RECENCY = "recency"
    RANDOM = "random"


def baseline_choice(
    choice: BlockChoice, source: PlanSource, *, num_candidates: int, seed: int
) -> BlockChoice:
    """As many blocks as `choice` has, taken by `source`; scores fall with the rank and only order them."""
    if source is PlanSource.MEMORY_INDEXER:
        return choice
    count = len(choice.blocks)
    if source is PlanSource.RECENCY:
        blocks = list(range(num_candidates - 1, num_candidates - 1 - count, -1))
    else:
        blocks = Random(seed).sample(range(num_candidates), count)
    return BlockChoice(
        blocks=tuple(map(BlockIdx, blocks)),
        scores=tuple(1.0 / (2 + rank) for rank in range(count)),
        num_above_threshold=choice.num_above_threshold,
    )
