"""Sequences that could page but don't, while there is room: they leave `full` when it runs short, and return.

Finished blocks are always in the arena, so leaving is one plan and its drops, and returning is one load. How
much of the pools may be promised to them is `worker.full_share`; a request that waits for blocks comes first.
"""

from collections.abc import Iterable

from forepage.settings import ResidencyMode
from forepage.telemetry import MetricName
from forepage.worker.parts import WorkerParts
from forepage.worker.questions import num_candidates
from forepage.worker.quota import Quota, try_change_promise
from forepage.worker.sequence import Phase, Room, Sequence


class FullByRoom:
    """Decides who keeps everything; the resident sets change as they always do (residency.py)."""

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        self.is_room_wanted = False
        """Whether a request waits for blocks: nobody is given more meanwhile."""

    def try_keep(self, sequence: Sequence) -> bool:
        """Before its first plan: whether the sequence stays `full`, for it and all it may come to be."""
        if not self._try_promise_all(sequence):
            return False
        sequence.room = Room.KEPT
        self._parts.telemetry.count(MetricName.ROOM_MOVES, reason="kept")
        return True

    def try_return(self, sequence: Sequence) -> bool:
        """At a boundary of a paged sequence: whether it may load all that is absent."""
        is_busy = sequence.lookahead.load is not None or sequence.is_exact or sequence.room is not Room.PAGED
        if is_busy or not self._try_promise_all(sequence):
            return False
        sequence.room = Room.FILLING
        self._parts.telemetry.count(MetricName.ROOM_MOVES, reason="returned")
        return True

    def make_room(self, sequences: Iterable[Sequence]) -> None:
        """A request found none: one sequence after the other asks for a plan and drops what it leaves out."""
        live = [sequence for sequence in sequences if sequence.phase is Phase.DECODE]
        if any(sequence.room is Room.LEAVING for sequence in live):
            return
        gains = {sequence.incarnation: self._gain(sequence) for sequence in live}
        best = max(live, key=lambda sequence: gains[sequence.incarnation], default=None)
        if best is None or gains[best.incarnation] <= 0:
            return
        best.room = Room.LEAVING
        best.lookahead.next_boundary = best.report.decode_steps
        self._parts.telemetry.count(MetricName.ROOM_MOVES, reason="left")

    def on_commit(self, sequence: Sequence) -> None:
        """The resident set changed: a move may be over."""
        if sequence.room is Room.FILLING and sequence.resident.rows_complete:
            sequence.room = Room.KEPT
        elif sequence.room is Room.LEAVING and not sequence.resident.rows_complete:
            sequence.room = Room.PAGED

    def _gain(self, sequence: Sequence) -> int:
        """Blocks that paging the sequence would free."""
        if sequence.room is not Room.KEPT:
            return 0
        parts = self._parts
        return num_candidates(sequence, parts.settings, parts.geometry) - sequence.guard.budget_blocks

    def _try_promise_all(self, sequence: Sequence) -> bool:
        parts, share = self._parts, self._parts.settings.full_share
        paged = (ResidencyMode.LOOKAHEAD, ResidencyMode.GUARDED)
        if not share or self.is_room_wanted or sequence.request.mode not in paged:
            return False
        holds, total = sequence.holds, parts.geometry.num_blocks(sequence.request.total_tokens)
        for pool, promise in ((parts.blocks.rows, holds.row_promise), (parts.blocks.keys, holds.key_promise)):
            if pool.promised - promise + total > share * pool.total:
                return False
        return try_change_promise(parts, sequence, Quota(total, total))
