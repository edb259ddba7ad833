"""Sequences that could page but don't, while there is room: they leave `full` when it runs short, and return.

Finished blocks are always in the arena, so leaving is one plan and its drops, and returning is one load:
nothing is computed again. How much of the pools may be promised to them is `worker.full_share`; a request
that waits for blocks comes first. One that names a budget asked to be paged, and is.
"""

import time
from collections.abc import Iterable, Mapping

from forepage.settings import ResidencyMode
from forepage.telemetry import MetricName
from forepage.worker.parts import WorkerParts
from forepage.worker.questions import num_candidates
from forepage.worker.quota import Quota, paged_quota, prefill_quota, try_change_promise
from forepage.worker.sequence import Phase, Room, Sequence

NOTHING = Quota(0, 0)


class FullByRoom:
    """Decides who keeps everything; the resident sets change as they always do (residency.py)."""

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        self.is_room_wanted = False
        """Whether a request waits for blocks: nobody is given more meanwhile."""

    def try_keep(self, sequence: Sequence) -> bool:
        """Before its first plan: whether the sequence stays `full`, for it and all it may come to be."""
        if not self._try_promise_all(sequence, num_staging=0):
            return False
        sequence.room, sequence.was_full_by_room = Room.KEPT, True
        self._parts.telemetry.count(MetricName.ROOM_MOVES, reason="kept")
        return True

    def try_return(self, sequence: Sequence) -> bool:
        """At a boundary of a paged sequence: whether it may load all that is absent."""
        is_escalated = sequence.is_exact and sequence.request.mode is not ResidencyMode.EXACT
        is_busy = sequence.lookahead.load is not None or is_escalated or sequence.room is not Room.PAGED
        staging = self._parts.blocks.staging_blocks if sequence.is_exact else 0
        if is_busy or not self._try_promise_all(sequence, num_staging=staging):
            return False
        self._begin(sequence, Room.FILLING)
        return True

    def make_room(self, waiting: Sequence, live: Iterable[Sequence]) -> None:
        """A request found no blocks: as many ask for a plan, and drop what it leaves out, as that takes."""
        decoding = {one.incarnation: one for one in live if one.phase is Phase.DECODE}
        leaving = [self._gain(one) for one in decoding.values() if one.room is Room.LEAVING]
        kept = {key: self._gain(one) for key, one in decoding.items() if one.room is Room.KEPT}
        for key in who_leaves(_less(self._lack(waiting), leaving), kept):
            self._begin(decoding[key], Room.LEAVING)
            decoding[key].lookahead.next_boundary = decoding[key].report.decode_steps

    def on_commit(self, sequence: Sequence, *, loaded_bytes: int, dropped_bytes: int) -> None:
        """The resident set changed: a move may be over."""
        count = self._parts.telemetry.count
        if sequence.room is Room.FILLING and sequence.resident.rows_complete:
            count(MetricName.ROOM_BYTES, loaded_bytes, reason="loaded")
            self._end(sequence, Room.KEPT, reason="returned")
            sequence.was_full_by_room = True
        elif sequence.room is Room.LEAVING and not sequence.resident.rows_complete:
            count(MetricName.ROOM_BYTES, dropped_bytes, reason="dropped")
            self._end(sequence, Room.PAGED, reason="left")

    def _begin(self, sequence: Sequence, room: Room) -> None:
        sequence.room, sequence.moves_since_s = room, time.monotonic()

    def _end(self, sequence: Sequence, room: Room, *, reason: str) -> None:
        sequence.room = room
        took_ms = (time.monotonic() - sequence.moves_since_s) * 1e3
        self._parts.telemetry.count(MetricName.ROOM_MOVES, reason=reason)
        self._parts.telemetry.record(MetricName.ROOM_MOVE_TIME, took_ms, span=sequence.span, reason=reason)

    def _gain(self, sequence: Sequence) -> Quota:
        """Blocks that nobody is promised any more once the sequence, `full` by room, is paged."""
        parts, holds = self._parts, sequence.holds
        if sequence.fits_budget(num_candidates(sequence, parts.settings, parts.geometry)):
            return NOTHING
        paged = paged_quota(parts, sequence)
        return Quota(max(0, holds.row_promise - paged.rows), max(0, holds.key_promise - paged.keys))

    def _lack(self, waiting: Sequence) -> Quota:
        """Blocks that are missing to admit the request."""
        parts, wanted = self._parts, prefill_quota(self._parts, waiting)
        return Quota(
            max(0, wanted.rows - parts.blocks.rows.num_unpromised),
            max(0, wanted.keys - parts.blocks.keys.num_unpromised),
        )

    def _try_promise_all(self, sequence: Sequence, *, num_staging: int) -> bool:
        parts, share = self._parts, self._parts.settings.full_share
        request = sequence.request
        if not share or self.is_room_wanted or request.asks_to_page or request.mode is ResidencyMode.FULL:
            return False
        holds, total = sequence.holds, parts.geometry.num_blocks(request.total_tokens)
        quota = Quota(total + num_staging, total)
        for pool, promise, wanted in (
            (parts.blocks.rows, holds.row_promise, quota.rows),
            (parts.blocks.keys, holds.key_promise, quota.keys),
        ):
            if pool.promised - promise + wanted > share * pool.total:
                return False
        return try_change_promise(parts, sequence, quota)


def who_leaves(lack: Quota, gains: Mapping[int, Quota]) -> list[int]:
    """Keys of the fewest, by greed, that make up for what is lacking; of nobody where all would not.

    Who gives most of what is lacking goes first, at equal gains the first of them.
    """
    chosen: list[int] = []
    while lack != NOTHING:
        rest = [(_useful(gain, lack), key) for key, gain in gains.items() if key not in chosen]
        useful, best = max(rest, key=lambda one: one[0], default=(0, None))
        if best is None or not useful:
            return []
        chosen.append(best)
        lack = _less(lack, [gains[best]])
    return chosen


def _useful(gain: Quota, lack: Quota) -> int:
    return min(gain.rows, lack.rows) + min(gain.keys, lack.keys)


def _less(lack: Quota, gains: Iterable[Quota]) -> Quota:
    for gain in gains:
        lack = Quota(max(0, lack.rows - gain.rows), max(0, lack.keys - gain.keys))
    return lack
