"""Where one sequence is in its lookahead: the question asked, the answer held, the load under way."""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum

from opentelemetry.trace import Span

from forepage.kv.ids import BlockIdx
from forepage.kv.prefetch_plan import LoadWave


class Outcome(StrEnum):
    """How an interval's plan ended; an attribute of its span."""

    COMMITTED = "committed"
    UNCHANGED = "unchanged"
    LATE = "late"
    INDEX_DOWN = "index_down"
    REFUSED = "refused"
    ENDED = "ended"


@dataclass
class Question:
    """A prediction asked for and not yet applied; `late` once it has been counted as such.

    `asked_tokens`: how many the sequence had processed then, the boundary's step included.
    """

    interval: int
    asked_s: float
    asked_tokens: int
    span: Span
    predict_span: Span
    answered_s: float | None = None
    late: bool = False


@dataclass
class LoadUnderWay:
    """Blocks on their way to the device; ids are allocated, no table names them yet."""

    wave: LoadWave
    rest: tuple[LoadWave, ...]
    row_ids: dict[int, int]
    key_ids: dict[int, int]
    future: Future[None]
    started_ns: int
    pinned_from: int
    question: Question | None
    outcome: Outcome
    for_exact: bool = False
    is_repair: bool = False
    lent_rows: int = 0
    lent_keys: int = 0
    """Of its blocks, those beyond what the sequence is promised: promised to the load, until it is over."""
    finished_ns: int | None = None

    def __post_init__(self) -> None:
        self.future.add_done_callback(self._finished)

    def _finished(self, _: Future[None]) -> None:
        self.finished_ns = time.time_ns()


@dataclass
class LookaheadState:
    """Intervals of one sequence.

    `desired` is a plan not yet started, `scores` with what probability each block was last wanted,
    `prompt` which blocks held evidence for the prompt's last tokens, and the largest share of it,
    `repair` what audits found missing (kept until the guard steps back). The `_due` flags ask for a
    change of the set without a plan: a repair, or the tail outgrowing the budget while plans fail.
    `is_redone`: the step that found the miss gave no token, and is made again after the repair; it is audited
    in the same layers, `audit_layers`. `newest_is_held`: the token of the step launched last waits for a
    verdict; `next_is_left_out`: that of the step read last was a miss, so the device left out the one behind.
    `repair_since` is the audited position a repair under way is for; audits of positions before
    `audits_from` saw the set from before the last one. For who watches: `just_loaded` are the blocks that
    the newest change brought, `missed` those that held evidence and were absent at the newest audited step.
    """

    interval: int = -1
    next_boundary: int = 0
    audit_steps: set[int] = field(default_factory=set)
    question: Question | None = None
    desired: list[tuple[BlockIdx, float]] | None = None
    scores: dict[BlockIdx, float] = field(default_factory=dict)
    prompt: dict[BlockIdx, float] = field(default_factory=dict)
    repair: dict[BlockIdx, float] = field(default_factory=dict)
    repair_due: bool = False
    rebalance_due: bool = False
    repair_since: int | None = None
    is_redone: bool = False
    audit_layers: tuple[int, ...] = ()
    newest_is_held: bool = False
    next_is_left_out: bool = False
    audits_from: int = 0
    want_exact: bool = False
    just_loaded: frozenset[int] = frozenset()
    missed: frozenset[int] = frozenset()
    load: LoadUnderWay | None = None

    @property
    def awaits_repair(self) -> bool:
        """Whether its next step is one that must be made again, and what it missed is not there yet."""
        return self.is_redone and self.repair_since is not None

    def add_prompt_evidence(self, shares: Sequence[float]) -> None:
        """By block, of some of the prompt's last tokens."""
        for idx, share in enumerate(shares):
            if share > 0.0:
                self.prompt[BlockIdx(idx)] = max(share, self.prompt.get(BlockIdx(idx), 0.0))
