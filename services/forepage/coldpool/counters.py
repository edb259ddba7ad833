"""What the cold pool counts: the figures of Stat and the instruments, kept in step in one place."""

import time
from collections.abc import Callable

from forepage.coldpool.record_ages import RecordAges
from forepage.coldpool.slot_table import SlotCounts
from forepage.telemetry import MetricName, Telemetry

ARENA = "arena"
"""Where a damaged record was found; otherwise the name of a tier."""


class ColdPoolCounters:
    """Owner of the totals since the start."""

    def __init__(self, telemetry: Telemetry, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` in seconds: ages of records."""
        self._telemetry = telemetry
        self.ages = RecordAges(telemetry, clock)
        self._slots = SlotCounts(0, 0, 0, 0, 0)
        self.evictions = 0
        self.damaged = 0
        self.tier_errors = 0
        self.stale_refs = 0
        self.directory_dropped = 0

    def count_evictions(self, count: int) -> None:
        """Records that left the arena."""
        self.evictions += count
        self._telemetry.count(MetricName.EVICTIONS, count)

    def count_damaged(self, where: str) -> None:
        """A record was refused because of its checksum (or header)."""
        self.damaged += 1
        self._telemetry.count(MetricName.DAMAGED, reason=where)

    def count_tier_error(self, tier: str) -> None:
        """A tier failed; what it was asked for counts as missing."""
        self.tier_errors += 1
        self._telemetry.count(MetricName.FALLBACKS, fallback=f"coldpool_tier_{tier}")

    def count_no_room(self) -> None:
        """Stored records were left in their tier because every slot of the arena is held."""
        self._telemetry.count(MetricName.FALLBACKS, fallback="coldpool_no_room_to_load")

    def count_stale_refs(self, count: int) -> None:
        """Refs given back that were not leased so."""
        self.stale_refs += count
        if count:
            self._telemetry.count(MetricName.FALLBACKS, count, fallback="coldpool_stale_ref")

    def count_directory_dropped(self, count: int) -> None:
        """Directory writes lost because the queue was full."""
        self.directory_dropped += count
        self._telemetry.count(MetricName.DIRECTORY_DROPPED, count)

    def show_slots(self, slots: SlotCounts) -> None:
        """Move the slot gauge to these counts."""
        before, self._slots = self._slots, slots
        for state in ("free", "writing", "leased", "cached"):
            delta = getattr(slots, state) - getattr(before, state)
            if delta:
                self._telemetry.move(MetricName.ARENA_SLOTS, delta, state=state)
