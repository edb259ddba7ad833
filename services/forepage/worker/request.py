"""What a caller asks of the worker, checked: the gRPC message as a value."""

from dataclasses import dataclass

from forepage.errors import ContextLengthError, RequestError
from forepage.kv.budget import budget_for
from forepage.kv.geometry import BLOCK_ENTRIES, C4_RATIO
from forepage.kv.plan_source import PlanSource
from forepage.rpc import index_pb2 as index_pb
from forepage.rpc import worker_pb2 as pb
from forepage.settings import ResidencyMode, WorkerSettings
from forepage.worker.call_grammar import CallableTool
from forepage.worker.sampler import Sampling

MODE_OF_PROTO: dict[pb.ResidencyMode, ResidencyMode] = {
    pb.RESIDENCY_MODE_FULL: ResidencyMode.FULL,
    pb.RESIDENCY_MODE_LOOKAHEAD: ResidencyMode.LOOKAHEAD,
    pb.RESIDENCY_MODE_GUARDED: ResidencyMode.GUARDED,
    pb.RESIDENCY_MODE_EXACT: ResidencyMode.EXACT,
}
BLOCK_TOKENS = BLOCK_ENTRIES * C4_RATIO
MAX_LOGPROBS = 20
"""Log-probabilities a token beside the chosen one's, as OpenAI allows."""
SOURCE_OF_PROTO: dict[index_pb.PlanSource, PlanSource] = {
    index_pb.PLAN_SOURCE_MEMORY_INDEXER: PlanSource.MEMORY_INDEXER,
    index_pb.PLAN_SOURCE_RECENCY: PlanSource.RECENCY,
    index_pb.PLAN_SOURCE_RANDOM: PlanSource.RANDOM,
}
PROTO_OF_SOURCE = {source: number for number, source in SOURCE_OF_PROTO.items()}
PROTO_OF_MODE = {mode: number for number, mode in MODE_OF_PROTO.items()}


@dataclass(frozen=True)
class Request:
    """One generation. `max_tokens` counts tokens to generate here; `budget_blocks` those chosen by score.

    `prompt` ends with the `num_answered` tokens that a worker which was lost had generated before.
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    stop_token_ids: frozenset[int]
    mode: ResidencyMode
    min_recall: float
    budget_blocks: int
    cache_salt: str
    json_schema: str | None = None
    free_until: int | None = None
    forced_tools: tuple[CallableTool, ...] = ()
    """The answer is calls of these; with `json_schema` either such calls or the JSON."""
    max_calls: int = 0
    """Of `forced_tools`; 0: any number."""
    plan_source: PlanSource = PlanSource.MEMORY_INDEXER
    threshold: float | None = None
    """An entry is wanted above this; None: as the index is set."""
    audit: bool = False
    """Audit whatever the mode, and report each audited step."""
    reads: bool = False
    """Report which blocks were read for the answer."""
    asks_to_page: bool = False
    """The caller named a budget, or a baseline's plans: it is not kept `full` because there is room."""
    num_answered: int = 0
    priority: int = 0
    """Of requests that wait the lowest is admitted first, then the oldest."""

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that the caller sent."""
        return len(self.prompt) - self.num_answered

    @property
    def answered(self) -> tuple[int, ...]:
        """Tokens generated before, by another worker."""
        return self.prompt[self.num_prompt_tokens :]

    @property
    def total_tokens(self) -> int:
        """Most tokens whose KV is ever computed: the last generated token's is not."""
        return len(self.prompt) + self.max_tokens - 1

    @classmethod
    def parse(
        cls, message: pb.GenerateRequest, settings: WorkerSettings, *, vocab_size: int, eos: int
    ) -> "Request":
        """Check every field. Raises: RequestError naming the field."""
        answered, how, residency = message.answered_token_ids, message.sampling, message.residency
        if not message.prompt_token_ids:
            raise RequestError("the prompt has no tokens", "prompt_token_ids")
        prompt = (*message.prompt_token_ids, *answered)
        if max(prompt) >= vocab_size:
            raise RequestError(
                f"token {max(prompt)} is beyond the vocabulary of {vocab_size}", "prompt_token_ids"
            )
        max_tokens = how.max_tokens - len(answered)
        if max_tokens < 1:
            raise RequestError(f"max_tokens must be at least {len(answered) + 1}", "max_tokens")
        if len(prompt) + max_tokens > settings.max_context_tokens:
            raise ContextLengthError(
                f"{len(prompt)} prompt tokens and {max_tokens} to generate exceed "
                f"{settings.max_context_tokens}; shorten the prompt or lower max_tokens",
                "prompt_token_ids",
            )
        min_recall = residency.min_recall if residency.HasField("min_recall") else settings.min_recall
        _check_range("forepage.min_recall", min_recall, 0.0, 1.0)
        names_budget = residency.HasField("budget_blocks")
        if names_budget and residency.budget_blocks < 1:
            raise RequestError("budget_blocks must be at least 1", "forepage.budget_blocks")
        total_blocks = -(-(len(prompt) + max_tokens - 1) // BLOCK_TOKENS)
        budget = settings.budget_blocks or budget_for(total_blocks)
        plan_source = SOURCE_OF_PROTO.get(residency.plan_source, PlanSource.MEMORY_INDEXER)
        if residency.HasField("threshold"):
            _check_range("forepage.threshold", residency.threshold, 0.0, 1.0)
        stop = set(how.stop_token_ids) | (set() if message.ignore_eos else {eos})
        return cls(
            request_id=message.request_id,
            prompt=prompt,
            sampling=_sampling(how),
            max_tokens=max_tokens,
            stop_token_ids=frozenset(stop),
            mode=MODE_OF_PROTO.get(residency.mode, settings.default_mode),
            min_recall=min_recall,
            budget_blocks=residency.budget_blocks if names_budget else budget,
            cache_salt=message.cache_salt,
            json_schema=how.json_schema if how.HasField("json_schema") else None,
            free_until=how.free_until_token_id if how.HasField("free_until_token_id") else None,
            forced_tools=tuple(CallableTool(tool.name, tool.parameters) for tool in how.forced_tools),
            max_calls=how.max_calls,
            plan_source=plan_source,
            threshold=residency.threshold if residency.HasField("threshold") else None,
            audit=residency.audit,
            reads=residency.reads,
            asks_to_page=names_budget or plan_source is not PlanSource.MEMORY_INDEXER,
            num_answered=len(answered),
            priority=message.priority,
        )


def _sampling(how: pb.Sampling) -> Sampling:
    _check_range("temperature", how.temperature, 0.0, 100.0)
    _check_range("top_p", how.top_p, 0.0, 1.0)
    _check_range("min_p", how.min_p, 0.0, 1.0)
    _check_range("presence_penalty", how.presence_penalty, -2.0, 2.0)
    _check_range("frequency_penalty", how.frequency_penalty, -2.0, 2.0)
    repetition = how.repetition_penalty or 1.0
    _check_range("repetition_penalty", repetition, 0.01, 100.0)
    if how.num_logprobs > MAX_LOGPROBS:
        raise RequestError(f"at most {MAX_LOGPROBS} logprobs a token", "top_logprobs")
    return Sampling(
        temperature=how.temperature,
        top_p=how.top_p or 1.0,
        top_k=how.top_k,
        min_p=how.min_p,
        seed=how.seed,
        presence_penalty=how.presence_penalty,
        frequency_penalty=how.frequency_penalty,
        repetition_penalty=repetition,
        num_logprobs=how.num_logprobs if how.logprobs else None,
    )


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also false for NaN
        raise RequestError(f"{name} must be between {low} and {high}, got {value}", name)
