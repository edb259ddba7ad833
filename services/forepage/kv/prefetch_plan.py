"""Which blocks a sequence should hold because of their score, and what to load and drop to get there.

The index decides what is desired (`choose_blocks`), the worker what that means for the set it holds now
(`plan_residency`). Both are pure; nothing here moves a byte. Scores are probabilities, falling order is
(-score, block_idx) everywhere, so equal input gives equal output on every host.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from forepage.errors import DependencyError
from forepage.kv.ids import BlockIdx, SequenceId


@dataclass(frozen=True)
class PlanStamp:
    """Which question a plan answers."""

    sequence_id: SequenceId
    incarnation: int  # new each time the sequence is (re)started on a worker
    interval: int  # 0 is the plan after prefill

    def answers(self, newest: "PlanStamp") -> bool:
        """Whether a plan with this stamp may still be applied when `newest` is the last question asked."""
        return self == newest


@dataclass(frozen=True)
class PrefetchPlan:
    """The desired blocks by falling score. Raises: DependencyError when they are not in that order."""

    stamp: PlanStamp
    blocks: tuple[BlockIdx, ...]
    scores: tuple[float, ...]
    num_above_threshold: int  # before the budget cut

    def __post_init__(self) -> None:
        if len(self.blocks) != len(self.scores):
            raise DependencyError(f"plan: {len(self.blocks)} blocks with {len(self.scores)} scores")
        if any(block < 0 for block in self.blocks) or len(set(self.blocks)) != len(self.blocks):
            raise DependencyError("plan: a block is negative or named twice")
        if not all(math.isfinite(score) for score in self.scores):
            raise DependencyError("plan: a score is not finite")
        ranks = list(self._ranks())
        if ranks != sorted(ranks):
            raise DependencyError("plan: blocks are not by falling score, lower block first at equal scores")

    def _ranks(self) -> Iterator[tuple[float, int]]:
        return ((-score, block) for block, score in zip(self.blocks, self.scores, strict=True))


@dataclass(frozen=True)
class BlockChoice:
    """What `choose_blocks` took, by falling score."""

    blocks: tuple[BlockIdx, ...]
    scores: tuple[float, ...]
    num_above_threshold: int


def choose_blocks(scores: Sequence[float], *, threshold: float, budget_blocks: int) -> BlockChoice:
    """The `budget_blocks` best of the blocks whose score exceeds the threshold; scores[i] is block i's.

    A NaN score is never above a threshold.
    """
    above = [(-score, block) for block, score in enumerate(scores) if score > threshold]
    above.sort()
    chosen = above[: max(budget_blocks, 0)]
    return BlockChoice(
        blocks=tuple(BlockIdx(block) for _, block in chosen),
        scores=tuple(-negated for negated, _ in chosen),
        num_above_threshold=len(above),
    )


@dataclass(frozen=True)
class LoadWave:
    """One commit: `load` fits the slack; once it is committed, `drop` leaves the set."""

    load: tuple[BlockIdx, ...]
    drop: tuple[BlockIdx, ...]


@dataclass(frozen=True)
class ResidencyChange:
    """From the set held now to the desired one. Blocks that are always resident appear nowhere."""

    keep: tuple[BlockIdx, ...]  # by falling score
    load: tuple[BlockIdx, ...]  # by falling score
    drop: tuple[BlockIdx, ...]  # lowest last score first, then oldest
    waves: tuple[LoadWave, ...]  # `load` and `drop`, cut so that each step fits

    @property
    def is_empty(self) -> bool:
        """Whether the set already is what is desired."""
        return not self.waves


def plan_residency(
    desired: Iterable[tuple[BlockIdx, float]],
    current_resident: Mapping[BlockIdx, float],
    *,
    always_resident_from: BlockIdx,
    budget_blocks: int,
    slack_blocks: int,
) -> ResidencyChange:
    """What to keep, load and drop; a pure function of its arguments.

    desired: blocks and scores in any order, a block named twice counts with its higher score.
    current_resident: what is held now, with the score each was last wanted with (0 if it never was).
    Blocks from `always_resident_from` on are not the plan's to touch and do not count in the budget.
    Laws: |keep| + |load| <= budget_blocks; keep, load and drop are disjoint; keep and drop are the held
    blocks below `always_resident_from`; while a wave loads, no more than budget_blocks + slack_blocks
    are held, or what was held before if that was more (a budget that shrank).
    Raises: DependencyError for a negative budget or no slack at all (nothing could ever load).
    """
    if budget_blocks < 0 or slack_blocks < 1:
        raise DependencyError(f"residency: budget of {budget_blocks} blocks, slack of {slack_blocks}")
    best: dict[BlockIdx, float] = {}
    for block, score in desired:
        if block < always_resident_from and score > best.get(block, -math.inf):
            best[block] = score
    wanted = sorted(best, key=lambda block: (-best[block], block))[:budget_blocks]
    held = {block: score for block, score in current_resident.items() if block < always_resident_from}
    keep = tuple(block for block in wanted if block in held)
    load = tuple(block for block in wanted if block not in held)
    kept = set(keep)
    drop = tuple(sorted((b for b in held if b not in kept), key=lambda block: (held[block], block)))
    waves = tuple(_waves(load, drop, num_held=len(held), budget=budget_blocks, slack=slack_blocks))
    return ResidencyChange(keep=keep, load=load, drop=drop, waves=waves)


def fit_waves(waves: Sequence[LoadWave], room: int) -> tuple[LoadWave, ...]:
    """The same change when only `room` blocks can be taken before the first commit; never empty.

    What does not fit follows in a wave of its own, after the first one's drops. Where nothing fits and
    nothing is dropped, the loads are given up and the drops stay: the next change then has room.
    """
    first, rest = waves[0], tuple(waves[1:])
    if len(first.load) <= room:
        return (first, *rest)
    if room == 0 and not first.drop:
        return (LoadWave((), tuple(block for wave in rest for block in wave.drop)),)
    return (LoadWave(first.load[:room], first.drop), LoadWave(first.load[room:], ()), *rest)


def _waves(
    load: Sequence[BlockIdx], drop: Sequence[BlockIdx], *, num_held: int, budget: int, slack: int
) -> Iterator[LoadWave]:
    """Best blocks load first; each commit drops just enough to be within the budget, the last the rest."""
    dropped = max(0, num_held - budget) if load else 0
    if dropped:  # the budget shrank: make room before the first load
        yield LoadWave(load=(), drop=tuple(drop[:dropped]))
    for start in range(0, len(load), slack):
        part = load[start : start + slack]
        is_last = start + slack >= len(load)
        excess = max(0, num_held + start + len(part) - budget)
        end = len(drop) if is_last else excess
        yield LoadWave(load=tuple(part), drop=tuple(drop[dropped:end]))
        dropped = end
    if not load and drop:
        yield LoadWave(load=(), drop=tuple(drop))
