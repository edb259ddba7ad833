"""What somebody who watches the worker sees of a sequence: ids, counts and block numbers, never a token.

Runs on the loop's thread between two steps, so a view is of one moment; only when it is asked for.
"""

from collections.abc import Iterable
from concurrent.futures import Future

from forepage.kv.resident_set import ResidentSet
from forepage.rpc import worker_pb2 as pb
from forepage.worker.request import PROTO_OF_MODE
from forepage.worker.sequence import Phase, Sequence

PROTO_OF_PHASE: dict[Phase, pb.SequencePhase] = {
    Phase.WAITING: pb.SEQUENCE_PHASE_WAITING,
    Phase.GRANTING: pb.SEQUENCE_PHASE_GRANTING,
    Phase.LOADING: pb.SEQUENCE_PHASE_LOADING,
    Phase.PREFILL: pb.SEQUENCE_PHASE_PREFILL,
    Phase.FIRST_PLAN: pb.SEQUENCE_PHASE_FIRST_PLAN,
    Phase.DECODE: pb.SEQUENCE_PHASE_DECODE,
    Phase.PAUSED: pb.SEQUENCE_PHASE_PAUSED,
}


def give_views(future: Future[list[pb.WatchedSequence]], sequences: Iterable[Sequence]) -> None:
    """Answer who watches, if he still waits. A view that can't be made is his loss, not the sequences'."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result([view_of(sequence) for sequence in sequences])
    except Exception as error:
        future.set_exception(error)


def view_of(sequence: Sequence) -> pb.WatchedSequence:
    """One sequence as it is now; one that was not admitted yet holds nothing."""
    state, report = sequence.lookahead, sequence.report
    view = pb.WatchedSequence(
        request_id=sequence.request.request_id,
        phase=PROTO_OF_PHASE[sequence.phase],
        mode=PROTO_OF_MODE[sequence.mode_now],
        prompt_tokens=sequence.request.num_prompt_tokens,
        cached_tokens=sequence.cached_tokens,
        processed_tokens=sequence.num_processed,
        generated_tokens=sequence.num_answer_tokens,
        budget_blocks=sequence.guard.budget_blocks,
        interval=max(0, state.interval),
        evidence_recall=report.recall.newest,
        prefetch_latency_ms=report.latency_ms.newest,
        kv_footprint=report.footprint.newest,
        late_plans=report.late_plans,
        escalations=report.escalations,
        prefetch_bytes=report.prefetch_bytes,
        demand_bytes=report.demand_bytes,
        stored_blocks=len(sequence.arena.ref_by_block),
        read_block_idx=sorted(report.reads.newest) if report.reads is not None else (),
    )
    if sequence.device is not None:
        resident = sequence.resident
        view.num_blocks, view.pinned_from = resident.num_blocks, resident.pinned_from
        view.resident = _bitmap(resident)
        view.missed_block_idx.extend(sorted(idx for idx in state.missed if idx < resident.num_blocks))
        view.prefetched_block_idx.extend(sorted(state.just_loaded & resident.row_id_by_block.keys()))
        if state.load is not None:
            view.loading_block_idx.extend(sorted(state.load.row_ids))
    return view


def _bitmap(resident: ResidentSet) -> bytes:
    """A bit a block, the lowest first: whether its rows are on the device."""
    bitmap = bytearray(-(-resident.num_blocks // 8))
    for idx in resident.row_id_by_block:
        bitmap[idx // 8] |= 1 << (idx % 8)
    return bytes(bitmap)
