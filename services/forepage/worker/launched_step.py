"""One decode step as the worker's loop sees it: what goes in, and what can be read once it is over.

A step may be launched before the tokens of the one before it have been read; then the device feeds itself.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from forepage.model.transformer import StepOutput
from forepage.worker.sampler import Pick, Row, sample
from forepage.worker.sequence import StepTap


@dataclass(frozen=True)
class DecodeRow:
    """One sequence's part in a step. `token` None: the one that the last step picked for this slot.

    `pulls`: it has staging blocks, so that absent rows can be fetched. `audit_layers`: c4 layers in which a
    device that can (Device.makes_audits) looks at what this step could not see; if the row wants a tap.
    Of its tap the host may want the attention inputs, for a plan, and what the indexers chose. `is_held`: the
    token waits for the audit's verdict; `marks_miss`: and the device marks a miss for the step behind.
    `awaits_verdict`: the slot's last step is held and its verdict is not read; where it marked a miss, this
    row is left out, and changes nothing of the slot's.
    """

    slot: int
    position: int
    token: int | None
    sampling: Row
    wants_tap: bool
    pulls: bool
    audit_layers: tuple[int, ...] = ()
    wants_hidden: bool = True
    wants_indexer: bool = True
    is_held: bool = False
    marks_miss: bool = False
    awaits_verdict: bool = False


@dataclass(frozen=True)
class StepResult:
    """By row: the next token, rows pulled from the arena, and rows that could not be (0 in a sound step)."""

    picks: Seq[Pick]
    pulled: Seq[int]
    unserved: Seq[int]


class LaunchedStep(Protocol):
    """A step under way; `fallbacks` names what was done otherwise than a GPU does it best."""

    @property
    def fallbacks(self) -> tuple[str, ...]: ...
    def is_done(self) -> bool: ...
    def read(self) -> StepResult: ...
    def tap(self, row: int) -> StepTap: ...


@dataclass(frozen=True)
class EagerStep:
    """A step that was computed and sampled when it was launched."""

    output: StepOutput
    result: StepResult
    fallbacks: tuple[str, ...] = ()

    @classmethod
    def sampled(cls, output: StepOutput, rows: Seq[DecodeRow], *, fallbacks: tuple[str, ...]) -> "EagerStep":
        """Pick the next tokens of what a step left."""
        picks = sample(output.logits, [row.sampling for row in rows])
        pulled, unserved = output.pulled_rows.tolist(), output.unserved_rows.tolist()
        return cls(output, StepResult(picks, pulled, unserved), fallbacks)

    def is_done(self) -> bool:
        """Always."""
        return True

    def read(self) -> StepResult:
        """What was picked."""
        return self.result

    def tap(self, row: int) -> StepTap:
        """What the step left for the lookahead."""
        return StepTap(self.output.hidden[row], self.output.indexer, row)
