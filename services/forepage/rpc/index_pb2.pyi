from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PlanSource(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PLAN_SOURCE_UNSPECIFIED: _ClassVar[PlanSource]
    PLAN_SOURCE_MEMORY_INDEXER: _ClassVar[PlanSource]
    PLAN_SOURCE_RECENCY: _ClassVar[PlanSource]
    PLAN_SOURCE_RANDOM: _ClassVar[PlanSource]
PLAN_SOURCE_UNSPECIFIED: PlanSource
PLAN_SOURCE_MEMORY_INDEXER: PlanSource
PLAN_SOURCE_RECENCY: PlanSource
PLAN_SOURCE_RANDOM: PlanSource

class Stamp(_message.Message):
    __slots__ = ("sequence_id", "incarnation", "interval")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    incarnation: int
    interval: int
    def __init__(self, sequence_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., interval: _Optional[int] = ...) -> None: ...

class LookaheadRequest(_message.Message):
    __slots__ = ("request_id", "traceparent", "stamp", "num_tokens", "arena_ids", "generations", "predict", "audits", "deadline_ms")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    STAMP_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ARENA_IDS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    PREDICT_FIELD_NUMBER: _ClassVar[int]
    AUDITS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    traceparent: str
    stamp: Stamp
    num_tokens: int
    arena_ids: bytes
    generations: bytes
    predict: Predict
    audits: _containers.RepeatedCompositeFieldContainer[Audit]
    deadline_ms: int
    def __init__(self, request_id: _Optional[int] = ..., traceparent: _Optional[str] = ..., stamp: _Optional[_Union[Stamp, _Mapping]] = ..., num_tokens: _Optional[int] = ..., arena_ids: _Optional[bytes] = ..., generations: _Optional[bytes] = ..., predict: _Optional[_Union[Predict, _Mapping]] = ..., audits: _Optional[_Iterable[_Union[Audit, _Mapping]]] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class Predict(_message.Message):
    __slots__ = ("num_candidates", "budget_blocks", "position", "hidden", "threshold", "source")
    NUM_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    num_candidates: int
    budget_blocks: int
    position: int
    hidden: bytes
    threshold: float
    source: PlanSource
    def __init__(self, num_candidates: _Optional[int] = ..., budget_blocks: _Optional[int] = ..., position: _Optional[int] = ..., hidden: _Optional[bytes] = ..., threshold: _Optional[float] = ..., source: _Optional[_Union[PlanSource, str]] = ...) -> None: ...

class Audit(_message.Message):
    __slots__ = ("layer_idx", "position", "query", "weights", "resident", "resident_scores", "topk", "resident_entries")
    LAYER_IDX_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_SCORES_FIELD_NUMBER: _ClassVar[int]
    TOPK_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    layer_idx: int
    position: int
    query: bytes
    weights: bytes
    resident: bytes
    resident_scores: bytes
    topk: int
    resident_entries: bytes
    def __init__(self, layer_idx: _Optional[int] = ..., position: _Optional[int] = ..., query: _Optional[bytes] = ..., weights: _Optional[bytes] = ..., resident: _Optional[bytes] = ..., resident_scores: _Optional[bytes] = ..., topk: _Optional[int] = ..., resident_entries: _Optional[bytes] = ...) -> None: ...

class LookaheadReply(_message.Message):
    __slots__ = ("request_id", "stamp", "plan", "audits", "error_code", "error_message")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STAMP_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    AUDITS_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    stamp: Stamp
    plan: Plan
    audits: _containers.RepeatedCompositeFieldContainer[AuditResult]
    error_code: str
    error_message: str
    def __init__(self, request_id: _Optional[int] = ..., stamp: _Optional[_Union[Stamp, _Mapping]] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., audits: _Optional[_Iterable[_Union[AuditResult, _Mapping]]] = ..., error_code: _Optional[str] = ..., error_message: _Optional[str] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("block_idx", "score", "num_scored", "num_above_threshold")
    BLOCK_IDX_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    NUM_SCORED_FIELD_NUMBER: _ClassVar[int]
    NUM_ABOVE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    block_idx: _containers.RepeatedScalarFieldContainer[int]
    score: _containers.RepeatedScalarFieldContainer[float]
    num_scored: int
    num_above_threshold: int
    def __init__(self, block_idx: _Optional[_Iterable[int]] = ..., score: _Optional[_Iterable[float]] = ..., num_scored: _Optional[int] = ..., num_above_threshold: _Optional[int] = ...) -> None: ...

class AuditResult(_message.Message):
    __slots__ = ("layer_idx", "position", "num_evidence", "num_evidence_resident", "missed_mass", "recall_at_k", "missing_block_idx", "missing_mass", "num_unread")
    LAYER_IDX_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    NUM_EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    NUM_EVIDENCE_RESIDENT_FIELD_NUMBER: _ClassVar[int]
    MISSED_MASS_FIELD_NUMBER: _ClassVar[int]
    RECALL_AT_K_FIELD_NUMBER: _ClassVar[int]
    MISSING_BLOCK_IDX_FIELD_NUMBER: _ClassVar[int]
    MISSING_MASS_FIELD_NUMBER: _ClassVar[int]
    NUM_UNREAD_FIELD_NUMBER: _ClassVar[int]
    layer_idx: int
    position: int
    num_evidence: int
    num_evidence_resident: int
    missed_mass: float
    recall_at_k: float
    missing_block_idx: _containers.RepeatedScalarFieldContainer[int]
    missing_mass: _containers.RepeatedScalarFieldContainer[float]
    num_unread: int
    def __init__(self, layer_idx: _Optional[int] = ..., position: _Optional[int] = ..., num_evidence: _Optional[int] = ..., num_evidence_resident: _Optional[int] = ..., missed_mass: _Optional[float] = ..., recall_at_k: _Optional[float] = ..., missing_block_idx: _Optional[_Iterable[int]] = ..., missing_mass: _Optional[_Iterable[float]] = ..., num_unread: _Optional[int] = ...) -> None: ...
