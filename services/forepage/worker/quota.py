"""How many row and key blocks a sequence can come to hold: what it must be promised before it may."""

from dataclasses import dataclass

from forepage.errors import IntegrityError
from forepage.settings import ResidencyMode
from forepage.worker.lookahead_state import LoadUnderWay
from forepage.worker.parts import WorkerParts
from forepage.worker.sequence import Room, Sequence


@dataclass(frozen=True)
class Quota:
    """Blocks of the two pools."""

    rows: int
    keys: int


def prefill_quota(parts: WorkerParts, sequence: Sequence) -> Quota:
    """While its prompt is prefilled all of it is on the device, whatever the mode."""
    prompt = parts.geometry.num_blocks(len(sequence.request.prompt))
    staging = parts.blocks.staging_blocks if sequence.is_exact else 0
    steady = steady_quota(parts, sequence)
    return Quota(max(prompt + staging, steady.rows), max(prompt, steady.keys))


def steady_quota(parts: WorkerParts, sequence: Sequence) -> Quota:
    """While it decodes: in `full` (asked for, or by room) everything, else what paging takes.

    On its way back to `full` an `exact` sequence pulls rows until the last one is there.
    """
    total = parts.geometry.num_blocks(sequence.request.total_tokens)
    if sequence.request.mode is ResidencyMode.FULL:
        return Quota(total, total)
    if sequence.is_full_by_room:
        pulls = sequence.room is Room.FILLING and sequence.is_exact
        return Quota(total + parts.blocks.staging_blocks * pulls, total)
    return paged_quota(parts, sequence)


def paged_quota(parts: WorkerParts, sequence: Sequence) -> Quota:
    """While it decodes and is paged: budget, tail and load slack; in `exact` all keys, and staging blocks."""
    total = parts.geometry.num_blocks(sequence.request.total_tokens)
    paged = min(total, sequence.guard.budget_blocks + parts.recent_blocks + parts.settings.load_slack_blocks)
    if sequence.is_exact:
        return Quota(paged + parts.blocks.staging_blocks, total)
    return Quota(paged, paged)


def try_change_promise(
    parts: WorkerParts, sequence: Sequence, quota: Quota, *, use_reserve: bool = False
) -> bool:
    """Grow or shrink what the sequence is promised to `quota`; all or nothing."""
    holds = sequence.holds
    more_rows, more_keys = quota.rows - holds.row_promise, quota.keys - holds.key_promise
    if not parts.blocks.rows.try_promise(more_rows, use_reserve=use_reserve):
        return False
    if not parts.blocks.keys.try_promise(more_keys, use_reserve=use_reserve):
        parts.blocks.rows.try_promise(-more_rows, use_reserve=True)
        return False
    holds.row_promise, holds.key_promise = quota.rows, quota.keys
    return True


def grow_promise(parts: WorkerParts, sequence: Sequence) -> bool:
    """Promise what the sequence's mode now needs, never below what it holds; False when there is no room."""
    holds, wanted, held = sequence.holds, steady_quota(parts, sequence), held_quota(parts, sequence)
    quota = Quota(
        max(holds.row_promise, wanted.rows, held.rows), max(holds.key_promise, wanted.keys, held.keys)
    )
    return try_change_promise(parts, sequence, quota, use_reserve=True)


def shrink_promise(parts: WorkerParts, sequence: Sequence) -> None:
    """Give back what the sequence no longer can come to hold.

    One that holds more than its mode should (the arena is away: nothing may be dropped) keeps its promise,
    so that what it drops later is room for its own tail.
    """
    holds, wanted, held = sequence.holds, steady_quota(parts, sequence), held_quota(parts, sequence)
    quota = Quota(
        min(holds.row_promise, wanted.rows) if held.rows <= wanted.rows else holds.row_promise,
        min(holds.key_promise, wanted.keys) if held.keys <= wanted.keys else holds.key_promise,
    )
    try_change_promise(parts, sequence, quota)


def held_quota(parts: WorkerParts, sequence: Sequence) -> Quota:
    """What it holds of its promise, loads under way included, and its staging to come in `exact`.

    What was lent to a load is not of its promise. While a sequence is `full` by room it has no staging: that
    comes when rows leave, and takes their place.
    """
    holds, load = sequence.holds, sequence.lookahead.load
    is_paged = sequence.keeps_keys and sequence.room not in (Room.KEPT, Room.LEAVING)
    staging = parts.blocks.staging_blocks if is_paged else len(holds.staging_ids)
    return Quota(
        len(holds.resident.row_id_by_block) + staging + (len(load.row_ids) - load.lent_rows if load else 0),
        len(holds.resident.key_id_by_block) + (len(load.key_ids) - load.lent_keys if load else 0),
    )


def room(parts: WorkerParts, sequence: Sequence) -> int:
    """Blocks the sequence may still take of what it was promised, each with its row and its key."""
    holds, held = sequence.holds, held_quota(parts, sequence)
    rows, keys = holds.row_promise - held.rows, holds.key_promise - held.keys
    return max(0, rows if sequence.keeps_keys and holds.resident.keys_complete else min(rows, keys))


def lend(parts: WorkerParts, sequence: Sequence, *, num_rows: int, num_keys: int) -> Quota:
    """Promise a load what of its blocks the sequence is not promised; the caller saw that they are there."""
    holds, held = sequence.holds, held_quota(parts, sequence)
    lent = Quota(
        max(0, num_rows - (holds.row_promise - held.rows)), max(0, num_keys - (holds.key_promise - held.keys))
    )
    if not (parts.blocks.rows.try_promise(lent.rows) and parts.blocks.keys.try_promise(lent.keys)):
        raise IntegrityError(f"a load of {num_rows} rows and {num_keys} keys, and no room to lend {lent}")
    return lent


def take_back(parts: WorkerParts, load: LoadUnderWay) -> None:
    """What was lent to a load that is over, its blocks committed or freed."""
    parts.blocks.rows.try_promise(-load.lent_rows)
    parts.blocks.keys.try_promise(-load.lent_keys)


def lendable(parts: WorkerParts) -> int:
    """Blocks that a load may be lent now, each with its row and its key."""
    blocks = parts.blocks
    return min(parts.settings.load_lent_blocks, blocks.rows.num_unpromised, blocks.keys.num_unpromised)
