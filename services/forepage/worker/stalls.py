"""How long paging keeps sequences that have their prompt from decoding: added up turn by turn, by reason."""

import time
from collections.abc import Callable, Iterable
from enum import StrEnum

from forepage.telemetry import MetricName, Telemetry
from forepage.worker.sequence import Phase, Sequence


class Stall(StrEnum):
    """What a sequence waits for: its first set, what an audited step missed, or blocks of the device."""

    FIRST_PLAN = "first_plan"
    REPAIR = "repair"
    ROOM = "room"


class Stalls:
    """Whoever is stalled at one tick has been until the next; ticked before every step."""

    def __init__(self, telemetry: Telemetry, clock: Callable[[], float] = time.monotonic) -> None:
        self._telemetry = telemetry
        self._clock = clock
        self._last_s = clock()
        self._stalled: list[tuple[Sequence, Stall]] = []

    def tick(self, live: Iterable[Sequence]) -> None:
        """Count the time since the last tick for those stalled then, and look who is now."""
        now_s = self._clock()
        passed_s, self._last_s = now_s - self._last_s, now_s
        for sequence, stall in self._stalled:
            sequence.report.stalled_ms += passed_s * 1e3
            self._telemetry.count(MetricName.STALLED, passed_s, reason=stall.value)
        stalls = ((sequence, stall_of(sequence)) for sequence in live)
        self._stalled = [(sequence, stall) for sequence, stall in stalls if stall is not None]


def stall_of(sequence: Sequence) -> Stall | None:
    """Why the sequence can't take a decode step now, if paging is the reason."""
    if sequence.phase is Phase.FIRST_PLAN:
        return Stall.FIRST_PLAN
    if sequence.phase is Phase.PAUSED:
        return Stall.ROOM
    if sequence.phase is not Phase.DECODE:
        return None
    if sequence.lookahead.awaits_repair:
        return Stall.REPAIR
    return None if sequence.blocked_since_s is None else Stall.ROOM
