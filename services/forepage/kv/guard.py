"""When a guarded sequence escalates and when it steps back: decisions only.

An audited step below the floor loads what was missing, in place of what was predicted with least confidence.
When more is missing than half the budget, or what was loaded is missed again, the budget is doubled; when
that is not enough either, the sequence moves to `exact`. In `exact` the same audit is made as if the pulled
rows had been absent; after enough clean intervals the sequence is paged again.
"""

from dataclasses import dataclass, replace
from enum import Enum, auto


class GuardAction(Enum):
    """What an audit calls for."""

    NONE = auto()
    REPAIR = auto()
    RAISE_BUDGET = auto()
    MOVE_TO_EXACT = auto()
    STEP_BACK = auto()


REPAIR_SHARE = 0.5
"""Of the budget, at most: the rest stays what it was, so a repair never drives out all that was held."""


@dataclass(frozen=True)
class Guard:
    """State of one guarded sequence between audits.

    `budget_blocks` is what it may keep by score now; `base_budget_blocks` what it was given.
    """

    min_recall: float
    base_budget_blocks: int
    budget_blocks: int
    clean_intervals_wanted: int
    repaired: bool = False
    raised: bool = False
    exact: bool = False
    clean_intervals: int = 0
    interval_is_clean: bool = True

    @classmethod
    def start(cls, *, min_recall: float, budget_blocks: int, clean_intervals: int) -> "Guard":
        """A sequence that has not been audited yet."""
        return cls(min_recall, budget_blocks, budget_blocks, clean_intervals)

    @property
    def max_repairs(self) -> int:
        """Blocks that may be held because an audit missed them."""
        return int(self.budget_blocks * REPAIR_SHARE)

    def to_exact(self) -> "Guard":
        """Moved there without (or beyond) an audit: the budget could not be raised, or the index is down."""
        return replace(
            self, exact=True, repaired=True, raised=True, clean_intervals=0, interval_is_clean=False
        )

    def on_audit(self, recall: float, *, num_repairs: int | None = None) -> tuple["Guard", GuardAction]:
        """One audited step's evidence recall (in `exact`: what it would have been).

        `num_repairs` blocks would be held as repairs: those that are, and those missed now. None: nothing is
        missed that was not repaired before, so that repairs do not hold.
        """
        if recall >= self.min_recall:
            return self, GuardAction.NONE
        if self.exact:
            return replace(self, interval_is_clean=False, clean_intervals=0), GuardAction.NONE
        if num_repairs is not None and num_repairs <= self.max_repairs:
            return replace(self, repaired=True, interval_is_clean=False), GuardAction.REPAIR
        if not self.raised:
            doubled = 2 * self.budget_blocks
            after = replace(self, repaired=True, raised=True, budget_blocks=doubled, interval_is_clean=False)
            return after, GuardAction.RAISE_BUDGET
        return self.to_exact(), GuardAction.MOVE_TO_EXACT

    def on_boundary(self) -> tuple["Guard", GuardAction]:
        """An interval ended: count clean ones, step back when there were enough in a row."""
        clean = self.clean_intervals + 1 if self.interval_is_clean else 0
        after = replace(self, clean_intervals=clean, interval_is_clean=True)
        if clean < self.clean_intervals_wanted or not (self.exact or self.raised or self.repaired):
            return after, GuardAction.NONE
        if self.exact:
            return replace(after, exact=False, clean_intervals=0), GuardAction.STEP_BACK
        budget = self.base_budget_blocks
        lowered = replace(after, repaired=False, raised=False, budget_blocks=budget, clean_intervals=0)
        return lowered, GuardAction.NONE
