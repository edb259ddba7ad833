"""Gives back what an ended sequence held, once nothing that was started for it is under way."""

from forepage.worker.admission import free_device
from forepage.worker.parts import WorkerParts
from forepage.worker.quota import take_back
from forepage.worker.sequence import Sequence


def try_release(parts: WorkerParts, sequence: Sequence) -> bool:
    """False while a step, a copy or an answer of the arena still names it."""
    load = sequence.lookahead.load
    if sequence.num_unread:
        return False
    if sequence.grant is not None:
        if not sequence.grant.done():
            return False
        sequence.take_unused_grant()
    if (load and not load.future.done()) or (sequence.prefix_load and not sequence.prefix_load.done()):
        return False
    if sequence.arena.writing:
        return False
    if load and sequence.device is not None:
        parts.blocks.rows.free(load.row_ids.values())
        parts.blocks.keys.free(load.key_ids.values())
        take_back(parts, load)
        sequence.lookahead.load = None
    free_device(parts, sequence)
    parts.arena.release(sequence.arena.all_refs(), sequence.span)
    sequence.span.end()
    sequence.released.set()
    return True
