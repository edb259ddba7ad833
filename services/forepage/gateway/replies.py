"""What clients get: OpenAI's objects, whole and in chunks, for chat and for plain completions."""

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel

from forepage.gateway.residency_usage import JsonScalar

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenCounts:
    """What is billed; `cached` are prompt tokens that were not computed again."""

    prompt: int
    cached: int
    completion: int


class PromptTokensDetails(BaseModel):
    """Prompt tokens by where their KV came from."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts, and `forepage`: what happened to the evidence (null when a stop string ended it)."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    forepage: dict[str, JsonScalar] | None


class AssistantMessage(BaseModel):
    """The answer of a chat."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """The only choice."""

    index: int = 0
    message: AssistantMessage
    logprobs: None = None
    finish_reason: FinishReason


class ChatChunkChoice(BaseModel):
    """The only choice, a piece of it."""

    index: int = 0
    delta: dict[str, str]
    logprobs: None = None
    finish_reason: FinishReason | None = None


class TextChoice(BaseModel):
    """The only choice, or a piece of it."""

    index: int = 0
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None = None


class ReplyHead(BaseModel):
    """What every reply begins with."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(ReplyHead):
    """POST /v1/chat/completions"""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(ReplyHead):
    """One SSE event of it; `usage` is there with stream_options.include_usage."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Completion(ReplyHead):
    """POST /v1/completions"""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
    usage: Usage | None = None


class ErrorDetail(BaseModel):
    """What went wrong; `param` names the field."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(BaseModel):
    """Every error."""

    error: ErrorDetail


class ModelCard(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "forepage"
    max_model_len: int


class ModelList(BaseModel):
    """GET /v1/models"""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def usage_of(counts: TokenCounts, residency: dict[str, JsonScalar] | None) -> Usage:
    """Usage from what was counted."""
    return Usage(
        prompt_tokens=counts.prompt,
        completion_tokens=counts.completion,
        total_tokens=counts.prompt + counts.completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=counts.cached),
        forepage=residency,
    )
