"""What the manager does between calls: free what dead holders held, check laws when idle, scrub payloads.

What checksums of arena payloads detect: bytes changed after publication by whatever (a stray write, bad
memory). `verify: scrub` sees it within a round of the scrubber, `verify: always` also before each lease.
Neither sees a wrong payload published with its own right checksum, nor damage between a check and a read.
"""

import asyncio

import structlog

from forepage.coldpool.holders import HolderRegistry
from forepage.coldpool.pool import ColdPool

_SCRUB_PAUSE_S = 1.0
"""Between two rounds, so that an empty or tiny arena is not scrubbed in a tight loop."""
_log = structlog.get_logger("forepage.coldpool")


async def reap_holders(pool: ColdPool, holders: HolderRegistry, *, interval_s: float) -> None:
    """For ever: drop holders whose process has ended. Raises: IntegrityError if an idle pool breaks a law."""
    checked, seen = -1, -1
    while True:
        for holder in holders.reap_gone():
            num_slots = pool.drop_holder(holder)
            say = _log.warning if num_slots else _log.info  # one that was stopped gave everything back
            say("holder_gone", holder=holder, num_slots=num_slots)
        if pool.num_changes == seen != checked:  # idle for one interval, and not checked since
            pool.table.check_integrity()
            checked = seen
        seen = pool.num_changes
        await asyncio.sleep(interval_s)


async def scrub(pool: ColdPool, *, bytes_per_s: int) -> None:
    """For ever: compare every complete payload with its checksum, at this speed; damage is refused."""
    while True:
        for ref in pool.table.complete_refs():
            record = pool.table.record_of(ref)
            if record is not None:
                await pool.check_payload(ref)
                await asyncio.sleep(record.payload_bytes / bytes_per_s)
        await asyncio.sleep(_SCRUB_PAUSE_S)
