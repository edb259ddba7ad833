"""Leasing the longest prefix that can be resumed, out of the arena and the tiers behind it.

The decision is pure (`longest_prefix`); this carries it out, and decides again without a record that
turns out damaged, gone, or without room, until every record of the answer is leased in the arena.
"""

from collections.abc import Sequence
from functools import partial

import structlog

from forepage.coldpool.lease_table import PrefixLease, longest_prefix
from forepage.coldpool.pool import ColdPool
from forepage.coldpool.shm_names import HolderId
from forepage.errors import CapacityError
from forepage.settings import Verify

_LOAD_BATCH = 8
"""Records loaded at once: bounds the heap that a long prefix takes on its way in."""
_log = structlog.get_logger("forepage.coldpool")


async def lease_prefix(
    pool: ColdPool,
    holder: HolderId,
    block_keys: Sequence[bytes],
    resume_keys: Sequence[Sequence[bytes]],
) -> PrefixLease:
    """Lease blocks 0..n-1 and the resume record at n, for the largest n there is; n = 0 leases nothing.

    Raises: RequestError if the holder is not attached.
    """
    pool.table.check_holder(holder)
    absent: set[bytes] = set()
    while True:
        stored = await _find_stored(pool, block_keys, resume_keys, absent)
        num_blocks = longest_prefix(block_keys, resume_keys, partial(_has, pool, stored, absent))
        if num_blocks == 0:
            return PrefixLease()
        wanted = [*block_keys[:num_blocks], *resume_keys[num_blocks - 1]]
        with pool.stage() as stage:
            gone = await _lease_all(pool, stage, wanted)
            refs = [ref for key in wanted if (ref := pool.table.find(key)) is not None]
            # A record may have been found damaged, even written anew elsewhere, while we waited.
            if len(refs) == len(wanted) and all(pool.table.is_leased_by(stage, ref) for ref in refs):
                pool.table.transfer(stage, holder)
                pool.counters.ages.take_use(ref.arena_id for ref in refs)
                return PrefixLease(tuple(refs[:num_blocks]), tuple(refs[num_blocks:]))
        absent |= gone


def _has(pool: ColdPool, stored: set[bytes], absent: set[bytes], key: bytes) -> bool:
    return key not in absent and (key in stored or pool.table.find(key) is not None)


async def _find_stored(
    pool: ColdPool, block_keys: Sequence[bytes], resume_keys: Sequence[Sequence[bytes]], absent: set[bytes]
) -> set[bytes]:
    """Which of the keys that the arena lacks are in a tier, as far as they matter."""

    def lacks(key: bytes) -> bool:
        return key not in absent and pool.table.find(key) is None

    if not pool.tiers:
        return set()
    stored = set(await pool.tiers.find([key for key in block_keys if lacks(key)]))
    parts: list[bytes] = []
    for key, its_parts in zip(block_keys, resume_keys, strict=True):
        if not _has(pool, stored, absent, key):
            break
        parts.extend(part for part in its_parts if lacks(part))
    return stored | set(await pool.tiers.find(parts))


async def _lease_all(pool: ColdPool, stage: HolderId, wanted: Sequence[bytes]) -> set[bytes]:
    """Lease what there is of these keys to `stage`, loading what the arena lacks.

    Answers the keys that no tier gave; damaged records are simply not found (in the arena) any more.
    What is in the arena is pinned first, so that loading the rest can't evict it.
    """
    present = {key: ref for key in wanted if (ref := pool.table.lease(stage, key)) is not None}
    if pool.verify is Verify.ALWAYS and not all(await pool.check_payloads(list(present.values()))):
        return set()
    missing = [key for key in wanted if key not in present]
    for start in range(0, len(missing), _LOAD_BATCH):
        try:
            gone = await pool.load(stage, missing[start : start + _LOAD_BATCH])
        except CapacityError:
            _log.warning("no_room_for_stored_records", wanted=len(missing), loaded=start)
            pool.counters.count_no_room()
            return set(missing[start:])
        if gone:
            return gone
    return set()
