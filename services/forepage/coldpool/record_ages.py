"""How long records live in the arena, lie unused, and wait to be used again: what sizes an arena.

Told of every move of a slot and of every use; pins of the manager's own (a spill, a check) are no use.
Ages of records that an earlier manager left are not known, and not recorded.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from forepage.coldpool.slot_table import Place, SlotMove
from forepage.kv.ids import ArenaId
from forepage.telemetry import MetricName, Telemetry


@dataclass(slots=True)
class _Age:
    born_s: float
    idle_since_s: float | None = None


class RecordAges:
    """Owner of the times, one for each record in the arena; `clock` in seconds."""

    def __init__(self, telemetry: Telemetry, clock: Callable[[], float]) -> None:
        self._telemetry = telemetry
        self._clock = clock
        self._ages: dict[ArenaId, _Age] = {}

    def take_moves(self, moves: Iterable[SlotMove]) -> None:
        """Slots that changed their place."""
        now_s = self._clock()
        for move in moves:
            if move.after is Place.FREE:
                age = self._ages.pop(move.arena_id, None)
                if age is not None and move.before is Place.CACHED:
                    self._record_evicted(age, now_s)
            elif move.before is Place.WRITING:
                self._ages[move.arena_id] = _Age(now_s, now_s if move.after is Place.CACHED else None)
            elif move.after is Place.CACHED and (age := self._ages.get(move.arena_id)) is not None:
                age.idle_since_s = now_s if age.idle_since_s is None else age.idle_since_s

    def take_use(self, arena_ids: Iterable[ArenaId]) -> None:
        """Records that somebody leased because he needs them."""
        now_s = self._clock()
        for arena_id in arena_ids:
            age = self._ages.get(arena_id)
            if age is not None and age.idle_since_s is not None:
                self._telemetry.record(MetricName.RECORD_REUSE_GAP, now_s - age.idle_since_s)
                age.idle_since_s = None

    def _record_evicted(self, age: _Age, now_s: float) -> None:
        self._telemetry.record(MetricName.RECORD_LIFETIME, now_s - age.born_s)
        if age.idle_since_s is not None:
            self._telemetry.record(MetricName.RECORD_IDLE, now_s - age.idle_since_s)
