"""A request of the stream as checked values: sizes, ranges and finiteness are settled here, once.

Everything behind this module may rely on it. Each refusal names the request's field; the stream goes on.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from forepage.coldpool.records import SlotRef
from forepage.errors import RequestError
from forepage.kv.geometry import BLOCK_ENTRIES, C4_RATIO, KvGeometry
from forepage.kv.ids import ArenaId, SequenceId
from forepage.kv.plan_source import PlanSource
from forepage.kv.prefetch_plan import PlanStamp
from forepage.model.spec import ModelSpec
from forepage.rpc import index_pb2 as pb

SOURCES: dict[pb.PlanSource, PlanSource] = {
    pb.PLAN_SOURCE_RECENCY: PlanSource.RECENCY,
    pb.PLAN_SOURCE_RANDOM: PlanSource.RANDOM,
}
"""The baselines; any other value is the memory indexer."""


@dataclass(frozen=True)
class QuestionLimits:
    """What the served model allows."""

    max_blocks: int
    max_position: int
    num_c4_layers: int
    index_heads: int
    index_dims: int
    num_target_layers: int
    hidden_size: int
    default_threshold: float

    @classmethod
    def of_model(
        cls, spec: ModelSpec, geometry: KvGeometry, *, num_target_layers: int, threshold: float
    ) -> "QuestionLimits":
        """Limits of a model; `threshold` is for predictions that name none."""
        return cls(
            max_blocks=geometry.num_blocks(spec.max_position),
            max_position=spec.max_position,
            num_c4_layers=len(geometry.c4_layers),
            index_heads=spec.index_heads,
            index_dims=spec.index_dims,
            num_target_layers=num_target_layers,
            hidden_size=spec.hidden_size,
            default_threshold=threshold,
        )


@dataclass(frozen=True)
class Prediction:
    """Which of blocks 0..num_candidates-1 will the tokens after `position` need?"""

    num_candidates: int
    budget_blocks: int
    position: int
    hidden: Tensor  # f32 [target layers, hidden]
    threshold: float
    source: PlanSource = PlanSource.MEMORY_INDEXER


@dataclass(frozen=True)
class AuditQuestion:
    """What of one layer's true top-k at one step was absent?"""

    layer_idx: int  # into the c4 layers
    position: int
    query: Tensor  # f32 [heads, dims], rotated iff stored keys are
    weights: Tensor  # f32 [heads]
    absent_blocks: tuple[int, ...]  # ascending
    resident: tuple[tuple[int, float], ...]  # (entry, score), no padding, each entry once
    topk: int


@dataclass(frozen=True)
class Question:
    """One checked request."""

    stamp: PlanStamp
    num_tokens: int
    blocks: tuple[SlotRef, ...]  # arena slots of blocks 0.. in order
    prediction: Prediction | None
    audits: tuple[AuditQuestion, ...]


def parse_request(request: pb.LookaheadRequest, limits: QuestionLimits) -> Question:
    """Raises: RequestError naming the field that is wrong."""
    blocks = _blocks(request, limits)
    if not request.HasField("predict") and not request.audits:
        raise _wrong("predict", "neither a prediction nor an audit is asked")
    return Question(
        stamp=PlanStamp(
            sequence_id=SequenceId(request.stamp.sequence_id),
            incarnation=request.stamp.incarnation,
            interval=request.stamp.interval,
        ),
        num_tokens=request.num_tokens,
        blocks=blocks,
        prediction=_prediction(request.predict, len(blocks), limits) if request.HasField("predict") else None,
        audits=tuple(
            _audit(f"audits[{i}]", audit, len(blocks), limits) for i, audit in enumerate(request.audits)
        ),
    )


def _blocks(request: pb.LookaheadRequest, limits: QuestionLimits) -> tuple[SlotRef, ...]:
    num_blocks, rest = divmod(len(request.arena_ids), 4)
    if rest:
        raise _wrong("arena_ids", f"{len(request.arena_ids)} bytes, not whole u32")
    if num_blocks > limits.max_blocks:
        raise _wrong(
            "arena_ids", f"{num_blocks} blocks, the model's longest sequence has {limits.max_blocks}"
        )
    if len(request.generations) != 8 * num_blocks:
        raise _wrong(
            "generations",
            f"{len(request.generations)} bytes, wanted {8 * num_blocks} for {num_blocks} blocks",
        )
    ids = np.frombuffer(request.arena_ids, dtype="<u4").tolist()
    generations = np.frombuffer(request.generations, dtype="<u8").tolist()
    return tuple(SlotRef(ArenaId(i), generation) for i, generation in zip(ids, generations, strict=True))


def _prediction(predict: pb.Predict, num_blocks: int, limits: QuestionLimits) -> Prediction:
    if predict.num_candidates > num_blocks:
        raise _wrong("predict.num_candidates", f"{predict.num_candidates} of only {num_blocks} blocks")
    threshold = predict.threshold if predict.HasField("threshold") else limits.default_threshold
    if not 0.0 <= threshold <= 1.0:
        raise _wrong("predict.threshold", f"{threshold} is outside 0..1")
    return Prediction(
        num_candidates=predict.num_candidates,
        budget_blocks=predict.budget_blocks,
        position=_position("predict.position", predict.position, limits),
        hidden=_floats("predict.hidden", predict.hidden, (limits.num_target_layers, limits.hidden_size)),
        threshold=threshold,
        source=SOURCES.get(predict.source, PlanSource.MEMORY_INDEXER),
    )


def _audit(name: str, audit: pb.Audit, num_blocks: int, limits: QuestionLimits) -> AuditQuestion:
    if audit.layer_idx >= limits.num_c4_layers:
        raise _wrong(f"{name}.layer_idx", f"{audit.layer_idx} of {limits.num_c4_layers} c4 layers")
    if audit.topk < 1:
        raise _wrong(f"{name}.topk", "must be at least 1")
    if len(audit.resident) != -(-num_blocks // 8):
        raise _wrong(
            f"{name}.resident",
            f"a bitmap of {len(audit.resident)} bytes, wanted {-(-num_blocks // 8)} for {num_blocks} blocks",
        )
    bits = np.unpackbits(np.frombuffer(audit.resident, dtype=np.uint8), bitorder="little")[:num_blocks]
    position = _position(f"{name}.position", audit.position, limits)
    return AuditQuestion(
        layer_idx=audit.layer_idx,
        position=position,
        query=_floats(f"{name}.query", audit.query, (limits.index_heads, limits.index_dims)),
        weights=_floats(f"{name}.weights", audit.weights, (limits.index_heads,)),
        absent_blocks=tuple(np.flatnonzero(bits == 0).tolist()),
        resident=_resident(name, audit, bits == 1, visible=(position + 1) // C4_RATIO),
        topk=audit.topk,
    )


def _position(name: str, position: int, limits: QuestionLimits) -> int:
    """Refused, not clamped: a clamped angle or visibility would be silently wrong."""
    if position >= limits.max_position:
        raise _wrong(name, f"{position} is outside the model's 0..{limits.max_position - 1}")
    return position


def _floats(name: str, data: bytes, shape: tuple[int, ...]) -> Tensor:
    """Little-endian f32 bytes as a tensor of that shape, all finite."""
    values = _f32(name, data)
    if values.size != np.prod(shape):
        raise _wrong(name, f"{values.size} values, wanted {'x'.join(map(str, shape))}")
    if not np.isfinite(values).all():
        raise _wrong(name, "holds values that are not finite")
    return torch.from_numpy(values.reshape(shape))


def _resident(
    name: str, audit: pb.Audit, is_resident: npt.NDArray[np.bool_], *, visible: int
) -> tuple[tuple[int, float], ...]:
    """The resident entries and their scores; a score of -inf is padding and goes with its entry.

    `is_resident` [num_blocks]: blocks after it (the sequence's newest) are never absent.
    """
    scores = _f32(f"{name}.resident_scores", audit.resident_scores)
    if np.isnan(scores).any() or np.isposinf(scores).any():
        raise _wrong(f"{name}.resident_scores", "holds NaN or +inf")
    name = f"{name}.resident_entries"
    if len(audit.resident_entries) != 4 * scores.size:
        raise _wrong(
            name, f"{len(audit.resident_entries)} bytes, wanted {4 * scores.size} for {scores.size} scores"
        )
    is_real = scores > -np.inf
    entries = np.frombuffer(audit.resident_entries, dtype="<u4").astype(np.int64)[is_real]
    if (entries >= visible).any():
        raise _wrong(name, f"{entries.max()} is not visible, {visible} entries are")
    in_bitmap = entries[entries < is_resident.size * BLOCK_ENTRIES]
    absent = in_bitmap[~is_resident[in_bitmap // BLOCK_ENTRIES]]
    if absent.size:
        raise _wrong(name, f"{absent[0]} is in block {absent[0] // BLOCK_ENTRIES}, which is absent")
    if np.unique(entries).size != entries.size:
        raise _wrong(name, "names an entry twice")
    return tuple(zip(entries.tolist(), scores[is_real].tolist(), strict=True))


def _f32(name: str, data: bytes) -> npt.NDArray[np.float32]:
    if len(data) % 4:
        raise _wrong(name, f"{len(data)} bytes, not whole f32")
    # A copy: bytes of a message are read-only, and torch wants to own what it may write.
    return cast("npt.NDArray[np.float32]", np.frombuffer(data, dtype="<f4").astype(np.float32))


def _wrong(name: str, message: str) -> RequestError:
    return RequestError(f"{name}: {message}", param=name)
