"""What clients get: OpenAI's objects, whole and in chunks, for chat and for plain completions."""

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, Field, JsonValue

from forepage.gateway.logprobs import ChatLogprobs, TextLogprobs
from forepage.gateway.residency_usage import ResidencyUsage

FinishReason = Literal["stop", "length", "tool_calls"]


def _is_none(value: object) -> bool:
    return value is None


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
    """Token counts, and `forepage`: what happened to the evidence (null when a stop string ended it).

    With several choices the prompt counts once, and `forepage.per_choice` has each one's report.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    forepage: ResidencyUsage | None


class FunctionCall(BaseModel):
    """What is called, with what: a JSON object as text."""

    name: str
    arguments: str


class MessageToolCall(BaseModel):
    """A call of the answer."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(BaseModel):
    """The answer of a chat; `content` is null when it only calls tools."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = Field(None, exclude_if=_is_none)
    tool_calls: list[MessageToolCall] | None = Field(None, exclude_if=_is_none)


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatChunkChoice(BaseModel):
    """One answer, a piece of it."""

    index: int
    delta: dict[str, JsonValue]
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class TextChoice(BaseModel):
    """One answer, or a piece of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
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
    """What went wrong, and what to do about it."""

    message: str = Field(description="one sentence for people; never quotes the request")
    type: str = Field(description="OpenAI's kind of error")
    param: str | None = Field(description="the field that is wrong, such as messages[2].tool_call_id")
    code: str = Field(description="one word for programs, such as context_length_exceeded")
    request_id: str = Field(description="as in the header x-request-id: logs and traces have it too")


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
