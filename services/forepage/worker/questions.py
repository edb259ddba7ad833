"""Builds what the worker asks the lookahead index: a prediction, audits, and the blocks they are about."""

import struct
from collections.abc import Sequence as Seq
from random import Random

from torch import Tensor

from forepage.kv.geometry import KvGeometry
from forepage.rpc import index_pb2 as pb
from forepage.settings import WorkerSettings
from forepage.worker.request import PROTO_OF_SOURCE
from forepage.worker.sequence import Sequence, StepTap


def num_candidates(sequence: Sequence, settings: WorkerSettings, geometry: KvGeometry) -> int:
    """Blocks 0..n-1 that may be paged: before the tail, and in the arena without a gap."""
    tail_start = max(0, sequence.num_processed - settings.recent_tokens) // geometry.block_tokens
    return min(tail_start, sequence.arena.num_leading)


def lookahead_request(
    sequence: Sequence, request_id: int, *, num_blocks: int, deadline_ms: int
) -> pb.LookaheadRequest:
    """The part every question has: stamp, and the arena slots of blocks 0..num_blocks-1."""
    refs = [sequence.arena.ref_by_block[idx] for idx in range(num_blocks)]
    return pb.LookaheadRequest(
        request_id=request_id,
        stamp=pb.Stamp(
            sequence_id=sequence.request.request_id,
            incarnation=sequence.incarnation,
            interval=max(sequence.lookahead.interval, 0),
        ),
        num_tokens=sequence.num_processed,
        arena_ids=struct.pack(f"<{num_blocks}I", *(ref.arena_id for ref in refs)),
        generations=struct.pack(f"<{num_blocks}Q", *(ref.generation for ref in refs)),
        deadline_ms=deadline_ms,
    )


def predict_message(sequence: Sequence, tap: StepTap, *, num_blocks: int) -> pb.Predict:
    """Ask which of blocks 0..num_blocks-1 the next interval wants, after the step that left `tap`."""
    assert tap.hidden is not None
    return pb.Predict(
        num_candidates=num_blocks,
        budget_blocks=sequence.guard.budget_blocks,
        position=sequence.num_processed - 1,
        hidden=_f32(tap.hidden),
        threshold=sequence.request.threshold,
        source=PROTO_OF_SOURCE[sequence.request.plan_source],
    )


def audit_messages(
    sequence: Sequence, tap: StepTap, layers: Seq[int], *, num_blocks: int, topk: int
) -> list[pb.Audit]:
    """Ask whether these c4 layers missed anything at the step that left `tap`."""
    held = sequence.resident.key_id_by_block
    bitmap = bytearray(-(-num_blocks // 8))
    for idx in range(num_blocks):
        if idx in held:
            bitmap[idx // 8] |= 1 << (idx % 8)
    audits = []
    for layer in layers:
        indexer = tap.indexer[layer]
        entries, scores = indexer.chosen(tap.row)
        audits.append(
            pb.Audit(
                layer_idx=layer,
                position=sequence.num_processed - 1,
                query=_f32(indexer.query[tap.row]),
                weights=_f32(indexer.weights[tap.row]),
                resident=bytes(bitmap),
                resident_scores=_f32(scores),
                topk=topk,
                resident_entries=struct.pack(f"<{entries.numel()}I", *entries.tolist()),
            )
        )
    return audits


def audited_layers(
    sequence: Sequence, settings: WorkerSettings, num_c4: int, *, num_tokens: int
) -> list[int]:
    """Which c4 layers to look at in the step that made it so many tokens: seeded by the request and them."""
    random = Random(f"{sequence.request.sampling.seed}/{num_tokens}")
    return sorted(random.sample(range(num_c4), min(settings.audit_layers, num_c4)))


def layers_of_step(step: int, count: int, num_c4: int) -> tuple[int, ...]:
    """The c4 layers that a worker's step-th step is audited in on its own device."""
    return tuple(sorted(Random(step).sample(range(num_c4), min(count, num_c4))))


def audit_steps(
    sequence: Sequence, settings: WorkerSettings, first_step: int, *, on_device: bool
) -> set[int]:
    """Steps of the interval that begins at `first_step` which are audited besides its end.

    Early ones at a fixed stride, since a short answer has no other; of all, some at random. The early ones
    need a device that audits itself (`on_device`): an index that is asked after every step answers late.
    """
    random = Random(f"{sequence.request.sampling.seed}/interval/{first_step}")
    inner = range(first_step + 1, first_step + settings.interval_steps)
    num_early = settings.early_audit_steps if on_device else 0
    early = range(1, num_early + 1, settings.early_audit_every_steps)
    dense = {step for step in early if step in inner}
    return dense | set(random.sample(inner, min(settings.random_audits, len(inner))))


def _f32(values: Tensor) -> bytes:
    return values.detach().float().cpu().contiguous().numpy().tobytes()
