from forepage.rpc import index_pb2 as _index_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ResidencyMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESIDENCY_MODE_UNSPECIFIED: _ClassVar[ResidencyMode]
    RESIDENCY_MODE_FULL: _ClassVar[ResidencyMode]
    RESIDENCY_MODE_LOOKAHEAD: _ClassVar[ResidencyMode]
    RESIDENCY_MODE_GUARDED: _ClassVar[ResidencyMode]
    RESIDENCY_MODE_EXACT: _ClassVar[ResidencyMode]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]

class SequencePhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SEQUENCE_PHASE_UNSPECIFIED: _ClassVar[SequencePhase]
    SEQUENCE_PHASE_WAITING: _ClassVar[SequencePhase]
    SEQUENCE_PHASE_GRANTING: _ClassVar[SequencePhase]
    SEQUENCE_PHASE_LOADING: _ClassVar[SequencePhase]
    SEQUENCE_PHASE_PREFILL: _ClassVar[SequencePhase]
    SEQUENCE_PHASE_FIRST_PLAN: _ClassVar[SequencePhase]
    SEQUENCE_PHASE_DECODE: _ClassVar[SequencePhase]
    SEQUENCE_PHASE_PAUSED: _ClassVar[SequencePhase]
RESIDENCY_MODE_UNSPECIFIED: ResidencyMode
RESIDENCY_MODE_FULL: ResidencyMode
RESIDENCY_MODE_LOOKAHEAD: ResidencyMode
RESIDENCY_MODE_GUARDED: ResidencyMode
RESIDENCY_MODE_EXACT: ResidencyMode
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
SEQUENCE_PHASE_UNSPECIFIED: SequencePhase
SEQUENCE_PHASE_WAITING: SequencePhase
SEQUENCE_PHASE_GRANTING: SequencePhase
SEQUENCE_PHASE_LOADING: SequencePhase
SEQUENCE_PHASE_PREFILL: SequencePhase
SEQUENCE_PHASE_FIRST_PLAN: SequencePhase
SEQUENCE_PHASE_DECODE: SequencePhase
SEQUENCE_PHASE_PAUSED: SequencePhase

class Tool(_message.Message):
    __slots__ = ("name", "parameters")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    parameters: str
    def __init__(self, name: _Optional[str] = ..., parameters: _Optional[str] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "stop_token_ids", "num_logprobs", "logprobs", "presence_penalty", "frequency_penalty", "repetition_penalty", "json_schema", "free_until_token_id", "forced_tools", "max_calls")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    FREE_UNTIL_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    FORCED_TOOLS_FIELD_NUMBER: _ClassVar[int]
    MAX_CALLS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    max_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_logprobs: int
    logprobs: bool
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    json_schema: str
    free_until_token_id: int
    forced_tools: _containers.RepeatedCompositeFieldContainer[Tool]
    max_calls: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., max_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., num_logprobs: _Optional[int] = ..., logprobs: bool = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., json_schema: _Optional[str] = ..., free_until_token_id: _Optional[int] = ..., forced_tools: _Optional[_Iterable[_Union[Tool, _Mapping]]] = ..., max_calls: _Optional[int] = ...) -> None: ...

class Residency(_message.Message):
    __slots__ = ("mode", "min_recall", "budget_blocks", "plan_source", "threshold", "audit", "reads")
    MODE_FIELD_NUMBER: _ClassVar[int]
    MIN_RECALL_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PLAN_SOURCE_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    AUDIT_FIELD_NUMBER: _ClassVar[int]
    READS_FIELD_NUMBER: _ClassVar[int]
    mode: ResidencyMode
    min_recall: float
    budget_blocks: int
    plan_source: _index_pb2.PlanSource
    threshold: float
    audit: bool
    reads: bool
    def __init__(self, mode: _Optional[_Union[ResidencyMode, str]] = ..., min_recall: _Optional[float] = ..., budget_blocks: _Optional[int] = ..., plan_source: _Optional[_Union[_index_pb2.PlanSource, str]] = ..., threshold: _Optional[float] = ..., audit: bool = ..., reads: bool = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "prompt_token_ids", "sampling", "residency", "cache_salt", "ignore_eos", "answered_token_ids", "priority")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: Sampling
    residency: Residency
    cache_salt: str
    ignore_eos: bool
    answered_token_ids: _containers.RepeatedScalarFieldContainer[int]
    priority: int
    def __init__(self, request_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., residency: _Optional[_Union[Residency, _Mapping]] = ..., cache_salt: _Optional[str] = ..., ignore_eos: bool = ..., answered_token_ids: _Optional[_Iterable[int]] = ..., priority: _Optional[int] = ...) -> None: ...

class GenerateEvent(_message.Message):
    __slots__ = ("started", "tokens", "finished", "failed")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    started: Started
    tokens: Tokens
    finished: Finished
    failed: Failed
    def __init__(self, started: _Optional[_Union[Started, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ...) -> None: ...

class Started(_message.Message):
    __slots__ = ("prompt_tokens", "cached_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    cached_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("token_ids", "chosen", "top")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    chosen: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    top: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., chosen: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ..., top: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("reason", "prompt_tokens", "cached_tokens", "completion_tokens", "residency")
    REASON_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    residency: ResidencyReport
    def __init__(self, reason: _Optional[_Union[FinishReason, str]] = ..., prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., residency: _Optional[_Union[ResidencyReport, _Mapping]] = ...) -> None: ...

class ResidencyReport(_message.Message):
    __slots__ = ("mode_requested", "mode_final", "full_by_size", "audited_steps", "audited_layers", "decode_steps", "audited_share", "audits_without_evidence", "audits_partial", "audits_lost", "evidence_recall_mean", "evidence_recall_min", "evidence_recall_first_mean", "evidence_recall_estimate", "evidence_recall_low95", "missed_mass_mean", "recall_at_k_mean", "escalations", "moves_to_exact", "tokens_before_escalation", "intervals", "late_plans", "index_down_intervals", "discarded_plans", "budget_blocks", "chosen_blocks_max", "always_resident_blocks_max", "resident_blocks_max", "load_slack_blocks", "demand_bytes", "prefetch_bytes", "kv_footprint", "c4_footprint", "prefetch_latency_ms_mean", "prefetch_latency_ms_max", "prefill_workspace_blocks", "full_steps", "paged_steps", "exact_steps", "paused_ms", "worker_audits", "plan_source", "footprint_flash", "chosen_blocks_mean", "evidence_recall_steps", "resident_block_idx", "resident_set_step", "resident_set_size", "resident_set_block_idx", "read_block_idx", "read_mass", "repairs", "redone_steps", "stalled_ms", "commit_steps_mean", "commit_steps_max", "resumed_tokens", "full_by_room")
    MODE_REQUESTED_FIELD_NUMBER: _ClassVar[int]
    MODE_FINAL_FIELD_NUMBER: _ClassVar[int]
    FULL_BY_SIZE_FIELD_NUMBER: _ClassVar[int]
    AUDITED_STEPS_FIELD_NUMBER: _ClassVar[int]
    AUDITED_LAYERS_FIELD_NUMBER: _ClassVar[int]
    DECODE_STEPS_FIELD_NUMBER: _ClassVar[int]
    AUDITED_SHARE_FIELD_NUMBER: _ClassVar[int]
    AUDITS_WITHOUT_EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    AUDITS_PARTIAL_FIELD_NUMBER: _ClassVar[int]
    AUDITS_LOST_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_RECALL_MEAN_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_RECALL_MIN_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_RECALL_FIRST_MEAN_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_RECALL_ESTIMATE_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_RECALL_LOW95_FIELD_NUMBER: _ClassVar[int]
    MISSED_MASS_MEAN_FIELD_NUMBER: _ClassVar[int]
    RECALL_AT_K_MEAN_FIELD_NUMBER: _ClassVar[int]
    ESCALATIONS_FIELD_NUMBER: _ClassVar[int]
    MOVES_TO_EXACT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_BEFORE_ESCALATION_FIELD_NUMBER: _ClassVar[int]
    INTERVALS_FIELD_NUMBER: _ClassVar[int]
    LATE_PLANS_FIELD_NUMBER: _ClassVar[int]
    INDEX_DOWN_INTERVALS_FIELD_NUMBER: _ClassVar[int]
    DISCARDED_PLANS_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_BLOCKS_MAX_FIELD_NUMBER: _ClassVar[int]
    ALWAYS_RESIDENT_BLOCKS_MAX_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BLOCKS_MAX_FIELD_NUMBER: _ClassVar[int]
    LOAD_SLACK_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DEMAND_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_FOOTPRINT_FIELD_NUMBER: _ClassVar[int]
    C4_FOOTPRINT_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_LATENCY_MS_MEAN_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_LATENCY_MS_MAX_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKSPACE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FULL_STEPS_FIELD_NUMBER: _ClassVar[int]
    PAGED_STEPS_FIELD_NUMBER: _ClassVar[int]
    EXACT_STEPS_FIELD_NUMBER: _ClassVar[int]
    PAUSED_MS_FIELD_NUMBER: _ClassVar[int]
    WORKER_AUDITS_FIELD_NUMBER: _ClassVar[int]
    PLAN_SOURCE_FIELD_NUMBER: _ClassVar[int]
    FOOTPRINT_FLASH_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_BLOCKS_MEAN_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_RECALL_STEPS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BLOCK_IDX_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_SET_STEP_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_SET_SIZE_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_SET_BLOCK_IDX_FIELD_NUMBER: _ClassVar[int]
    READ_BLOCK_IDX_FIELD_NUMBER: _ClassVar[int]
    READ_MASS_FIELD_NUMBER: _ClassVar[int]
    REPAIRS_FIELD_NUMBER: _ClassVar[int]
    REDONE_STEPS_FIELD_NUMBER: _ClassVar[int]
    STALLED_MS_FIELD_NUMBER: _ClassVar[int]
    COMMIT_STEPS_MEAN_FIELD_NUMBER: _ClassVar[int]
    COMMIT_STEPS_MAX_FIELD_NUMBER: _ClassVar[int]
    RESUMED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FULL_BY_ROOM_FIELD_NUMBER: _ClassVar[int]
    mode_requested: ResidencyMode
    mode_final: ResidencyMode
    full_by_size: bool
    audited_steps: int
    audited_layers: int
    decode_steps: int
    audited_share: float
    audits_without_evidence: int
    audits_partial: int
    audits_lost: int
    evidence_recall_mean: float
    evidence_recall_min: float
    evidence_recall_first_mean: float
    evidence_recall_estimate: float
    evidence_recall_low95: float
    missed_mass_mean: float
    recall_at_k_mean: float
    escalations: int
    moves_to_exact: int
    tokens_before_escalation: int
    intervals: int
    late_plans: int
    index_down_intervals: int
    discarded_plans: int
    budget_blocks: int
    chosen_blocks_max: int
    always_resident_blocks_max: int
    resident_blocks_max: int
    load_slack_blocks: int
    demand_bytes: int
    prefetch_bytes: int
    kv_footprint: float
    c4_footprint: float
    prefetch_latency_ms_mean: float
    prefetch_latency_ms_max: float
    prefill_workspace_blocks: int
    full_steps: int
    paged_steps: int
    exact_steps: int
    paused_ms: int
    worker_audits: int
    plan_source: _index_pb2.PlanSource
    footprint_flash: float
    chosen_blocks_mean: float
    evidence_recall_steps: _containers.RepeatedScalarFieldContainer[float]
    resident_block_idx: _containers.RepeatedScalarFieldContainer[int]
    resident_set_step: _containers.RepeatedScalarFieldContainer[int]
    resident_set_size: _containers.RepeatedScalarFieldContainer[int]
    resident_set_block_idx: _containers.RepeatedScalarFieldContainer[int]
    read_block_idx: _containers.RepeatedScalarFieldContainer[int]
    read_mass: _containers.RepeatedScalarFieldContainer[float]
    repairs: int
    redone_steps: int
    stalled_ms: int
    commit_steps_mean: float
    commit_steps_max: int
    resumed_tokens: int
    full_by_room: bool
    def __init__(self, mode_requested: _Optional[_Union[ResidencyMode, str]] = ..., mode_final: _Optional[_Union[ResidencyMode, str]] = ..., full_by_size: bool = ..., audited_steps: _Optional[int] = ..., audited_layers: _Optional[int] = ..., decode_steps: _Optional[int] = ..., audited_share: _Optional[float] = ..., audits_without_evidence: _Optional[int] = ..., audits_partial: _Optional[int] = ..., audits_lost: _Optional[int] = ..., evidence_recall_mean: _Optional[float] = ..., evidence_recall_min: _Optional[float] = ..., evidence_recall_first_mean: _Optional[float] = ..., evidence_recall_estimate: _Optional[float] = ..., evidence_recall_low95: _Optional[float] = ..., missed_mass_mean: _Optional[float] = ..., recall_at_k_mean: _Optional[float] = ..., escalations: _Optional[int] = ..., moves_to_exact: _Optional[int] = ..., tokens_before_escalation: _Optional[int] = ..., intervals: _Optional[int] = ..., late_plans: _Optional[int] = ..., index_down_intervals: _Optional[int] = ..., discarded_plans: _Optional[int] = ..., budget_blocks: _Optional[int] = ..., chosen_blocks_max: _Optional[int] = ..., always_resident_blocks_max: _Optional[int] = ..., resident_blocks_max: _Optional[int] = ..., load_slack_blocks: _Optional[int] = ..., demand_bytes: _Optional[int] = ..., prefetch_bytes: _Optional[int] = ..., kv_footprint: _Optional[float] = ..., c4_footprint: _Optional[float] = ..., prefetch_latency_ms_mean: _Optional[float] = ..., prefetch_latency_ms_max: _Optional[float] = ..., prefill_workspace_blocks: _Optional[int] = ..., full_steps: _Optional[int] = ..., paged_steps: _Optional[int] = ..., exact_steps: _Optional[int] = ..., paused_ms: _Optional[int] = ..., worker_audits: _Optional[int] = ..., plan_source: _Optional[_Union[_index_pb2.PlanSource, str]] = ..., footprint_flash: _Optional[float] = ..., chosen_blocks_mean: _Optional[float] = ..., evidence_recall_steps: _Optional[_Iterable[float]] = ..., resident_block_idx: _Optional[_Iterable[int]] = ..., resident_set_step: _Optional[_Iterable[int]] = ..., resident_set_size: _Optional[_Iterable[int]] = ..., resident_set_block_idx: _Optional[_Iterable[int]] = ..., read_block_idx: _Optional[_Iterable[int]] = ..., read_mass: _Optional[_Iterable[float]] = ..., repairs: _Optional[int] = ..., redone_steps: _Optional[int] = ..., stalled_ms: _Optional[int] = ..., commit_steps_mean: _Optional[float] = ..., commit_steps_max: _Optional[int] = ..., resumed_tokens: _Optional[int] = ..., full_by_room: bool = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("code", "message", "param", "retry_after_s")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PARAM_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    param: str
    retry_after_s: float
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., param: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("worker_id", "model_name", "model_fingerprint", "max_context_tokens", "default_mode", "running", "waiting", "max_running", "row_blocks_free", "row_blocks_total", "key_blocks_free", "key_blocks_total", "device", "draining", "slots_free", "arena_slots_held")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_MODE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    ROW_BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    ROW_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KEY_BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    KEY_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FREE_FIELD_NUMBER: _ClassVar[int]
    ARENA_SLOTS_HELD_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    model_name: str
    model_fingerprint: str
    max_context_tokens: int
    default_mode: ResidencyMode
    running: int
    waiting: int
    max_running: int
    row_blocks_free: int
    row_blocks_total: int
    key_blocks_free: int
    key_blocks_total: int
    device: str
    draining: bool
    slots_free: int
    arena_slots_held: int
    def __init__(self, worker_id: _Optional[str] = ..., model_name: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., max_context_tokens: _Optional[int] = ..., default_mode: _Optional[_Union[ResidencyMode, str]] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., max_running: _Optional[int] = ..., row_blocks_free: _Optional[int] = ..., row_blocks_total: _Optional[int] = ..., key_blocks_free: _Optional[int] = ..., key_blocks_total: _Optional[int] = ..., device: _Optional[str] = ..., draining: bool = ..., slots_free: _Optional[int] = ..., arena_slots_held: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("interval_ms",)
    INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    interval_ms: int
    def __init__(self, interval_ms: _Optional[int] = ...) -> None: ...

class WatchFrame(_message.Message):
    __slots__ = ("worker", "sequences")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    worker: DescribeReply
    sequences: _containers.RepeatedCompositeFieldContainer[WatchedSequence]
    def __init__(self, worker: _Optional[_Union[DescribeReply, _Mapping]] = ..., sequences: _Optional[_Iterable[_Union[WatchedSequence, _Mapping]]] = ...) -> None: ...

class WatchedSequence(_message.Message):
    __slots__ = ("request_id", "phase", "mode", "prompt_tokens", "cached_tokens", "processed_tokens", "generated_tokens", "num_blocks", "pinned_from", "resident", "loading_block_idx", "prefetched_block_idx", "missed_block_idx", "read_block_idx", "budget_blocks", "interval", "evidence_recall", "prefetch_latency_ms", "kv_footprint", "late_plans", "escalations", "prefetch_bytes", "demand_bytes", "stored_blocks")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROCESSED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FROM_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    LOADING_BLOCK_IDX_FIELD_NUMBER: _ClassVar[int]
    PREFETCHED_BLOCK_IDX_FIELD_NUMBER: _ClassVar[int]
    MISSED_BLOCK_IDX_FIELD_NUMBER: _ClassVar[int]
    READ_BLOCK_IDX_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_RECALL_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_LATENCY_MS_FIELD_NUMBER: _ClassVar[int]
    KV_FOOTPRINT_FIELD_NUMBER: _ClassVar[int]
    LATE_PLANS_FIELD_NUMBER: _ClassVar[int]
    ESCALATIONS_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEMAND_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    phase: SequencePhase
    mode: ResidencyMode
    prompt_tokens: int
    cached_tokens: int
    processed_tokens: int
    generated_tokens: int
    num_blocks: int
    pinned_from: int
    resident: bytes
    loading_block_idx: _containers.RepeatedScalarFieldContainer[int]
    prefetched_block_idx: _containers.RepeatedScalarFieldContainer[int]
    missed_block_idx: _containers.RepeatedScalarFieldContainer[int]
    read_block_idx: _containers.RepeatedScalarFieldContainer[int]
    budget_blocks: int
    interval: int
    evidence_recall: float
    prefetch_latency_ms: float
    kv_footprint: float
    late_plans: int
    escalations: int
    prefetch_bytes: int
    demand_bytes: int
    stored_blocks: int
    def __init__(self, request_id: _Optional[str] = ..., phase: _Optional[_Union[SequencePhase, str]] = ..., mode: _Optional[_Union[ResidencyMode, str]] = ..., prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., processed_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., num_blocks: _Optional[int] = ..., pinned_from: _Optional[int] = ..., resident: _Optional[bytes] = ..., loading_block_idx: _Optional[_Iterable[int]] = ..., prefetched_block_idx: _Optional[_Iterable[int]] = ..., missed_block_idx: _Optional[_Iterable[int]] = ..., read_block_idx: _Optional[_Iterable[int]] = ..., budget_blocks: _Optional[int] = ..., interval: _Optional[int] = ..., evidence_recall: _Optional[float] = ..., prefetch_latency_ms: _Optional[float] = ..., kv_footprint: _Optional[float] = ..., late_plans: _Optional[int] = ..., escalations: _Optional[int] = ..., prefetch_bytes: _Optional[int] = ..., demand_bytes: _Optional[int] = ..., stored_blocks: _Optional[int] = ...) -> None: ...
