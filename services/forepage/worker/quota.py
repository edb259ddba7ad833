"""How many row and key blocks a sequence can come to hold: what it must be promised before it may."""

from dataclasses import dataclass

from forepage.settings import ResidencyMode
from forepage.worker.parts import WorkerParts
from forepage.worker.sequence import Sequence


@dataclass(frozen=True)
class Quota:
    """Blocks of the two pools."""

    rows: int
    keys: int


def prefill_quota(parts: WorkerParts, sequence: Sequence) -> Quota:
    """While its prompt is prefilled all of it is on the device, whatever the mode."""
    prompt = parts.geometry.num_blocks(len(sequence.request.prompt))
    steady = steady_quota(parts, sequence)
    return Quota(max(prompt, steady.rows), max(prompt, steady.keys))


def steady_quota(parts: WorkerParts, sequence: Sequence) -> Quota:
    """While it decodes: everything in `full`, else budget, tail and load slack (all keys in `exact`)."""
    total = parts.geometry.num_blocks(sequence.request.total_tokens)
    if sequence.request.mode is ResidencyMode.FULL:
        return Quota(total, total)
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


def shrink_promise(parts: WorkerParts, sequence: Sequence) -> None:
    """Give back what the sequence no longer can come to hold, never below what it holds now."""
    holds, wanted = sequence.holds, steady_quota(parts, sequence)
    load = sequence.lookahead.load
    loading = len(load.row_ids) if load else 0, len(load.key_ids) if load else 0
    rows_held = len(holds.resident.row_id_by_block) + loading[0] + len(holds.staging_ids)
    keys_held = len(holds.resident.key_id_by_block) + loading[1]
    try_change_promise(
        parts,
        sequence,
        Quota(
            min(holds.row_promise, max(wanted.rows, rows_held)),
            min(holds.key_promise, max(wanted.keys, keys_held)),
        ),
    )
