"""When a guarded sequence escalates and when it steps back: decisions only.

An audited step below the floor first loads what was missing and doubles the budget; if that does not
hold, the sequence moves to `exact`. In `exact` the same audit is made as if the pulled rows had been
absent; after enough clean intervals the sequence is paged again.
"""

from dataclasses import dataclass, replace
from enum import Enum, auto


class GuardAction(Enum):
    """What an audit calls for."""

    NONE = auto()
    RAISE_BUDGET = auto()
    MOVE_TO_EXACT = auto()
    STEP_BACK = auto()


@dataclass(frozen=True)
class Guard:
    """State of one guarded sequence between audits.

    `budget_blocks` is what it may keep by score now; `base_budget_blocks` what it was given.
    """

    min_recall: float
    base_budget_blocks: int
    budget_blocks: int
    clean_intervals_wanted: int
    raised: bool = False
    exact: bool = False
    clean_intervals: int = 0
    interval_is_clean: bool = True

    @classmethod
    def start(cls, *, min_recall: float, budget_blocks: int, clean_intervals: int) -> "Guard":
        """A sequence that has not been audited yet."""
        return cls(min_recall, budget_blocks, budget_blocks, clean_intervals)

    def to_exact(self) -> "Guard":
        """Moved there without (or beyond) an audit: the budget could not be raised, or the index is down."""
        return replace(self, exact=True, raised=True, clean_intervals=0, interval_is_clean=False)

    def on_audit(self, recall: float) -> tuple["Guard", GuardAction]:
        """One audited layer's evidence recall (in `exact`: what it would have been)."""
        if recall >= self.min_recall:
            return self, GuardAction.NONE
        if self.exact:
            return replace(self, interval_is_clean=False, clean_intervals=0), GuardAction.NONE
        if not self.raised:
            after = replace(self, raised=True, budget_blocks=2 * self.budget_blocks, interval_is_clean=False)
            return after, GuardAction.RAISE_BUDGET
        after = replace(self, exact=True, clean_intervals=0, interval_is_clean=False)
        return after, GuardAction.MOVE_TO_EXACT

    def on_boundary(self) -> tuple["Guard", GuardAction]:
        """An interval ended: count clean ones, step back when there were enough in a row."""
        clean = self.clean_intervals + 1 if self.interval_is_clean else 0
        after = replace(self, clean_intervals=clean, interval_is_clean=True)
        if clean < self.clean_intervals_wanted or not (self.exact or self.raised):
            return after, GuardAction.NONE
        if self.exact:
            return replace(after, exact=False, raised=True, clean_intervals=0), GuardAction.STEP_BACK
        lowered = replace(after, raised=False, budget_blocks=self.base_budget_blocks, clean_intervals=0)
        return lowered, GuardAction.NONE
