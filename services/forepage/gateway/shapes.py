"""How each endpoint words its answers, whole or in chunks."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from pydantic import BaseModel, JsonValue

from forepage.gateway.choice import Choice
from forepage.gateway.logprobs import ScoredToken, chat_logprobs, text_logprobs
from forepage.gateway.replies import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    FinishReason,
    FunctionCall,
    MessageToolCall,
    ReplyHead,
    TextChoice,
    Usage,
)
from forepage.text.answer_parser import ArgumentsDelta, CallDelta, Delta, ReasoningDelta


class AnswerShape(ABC):
    """How one endpoint words one reply."""

    ID_PREFIX: ClassVar[str]

    def __init__(self, *, request_id: str, created: int, model: str, fingerprint: str) -> None:
        self._request_id = request_id
        self._head = ReplyHead(
            id=f"{self.ID_PREFIX}-{request_id}", created=created, model=model, system_fingerprint=fingerprint
        ).model_dump()

    @abstractmethod
    def whole(self, choices: Sequence[Choice], usage: Usage) -> BaseModel:
        """The reply in one."""

    @abstractmethod
    def opening(self, index: int) -> BaseModel | None:
        """What comes before anything of a choice."""

    @abstractmethod
    def chunk(self, index: int, delta: Delta, tokens: Sequence[ScoredToken]) -> BaseModel:
        """A piece of a choice."""

    @abstractmethod
    def closing(self, index: int, finish_reason: FinishReason, tokens: Sequence[ScoredToken]) -> BaseModel:
        """The last piece of a choice: why it ended."""

    @abstractmethod
    def usage(self, usage: Usage) -> BaseModel:
        """The event after the last piece."""


class ChatShape(AnswerShape):
    """Chat."""

    ID_PREFIX = "chatcmpl"

    def whole(self, choices: Sequence[Choice], usage: Usage) -> ChatCompletion:
        """The messages."""
        return ChatCompletion(
            **self._head,
            choices=[
                ChatChoice(
                    index=index,
                    message=self._message(index, choice),
                    logprobs=chat_logprobs(choice.tokens),
                    finish_reason=choice.finish_reason,
                )
                for index, choice in enumerate(choices)
            ],
            usage=usage,
        )

    def opening(self, index: int) -> ChatCompletionChunk:
        """The role."""
        return self._chunk(ChatChunkChoice(index=index, delta={"role": "assistant", "content": ""}))

    def chunk(self, index: int, delta: Delta, tokens: Sequence[ScoredToken]) -> ChatCompletionChunk:
        """A piece of the message."""
        worded = self._delta(index, delta)
        return self._chunk(ChatChunkChoice(index=index, delta=worded, logprobs=chat_logprobs(tokens)))

    def closing(
        self, index: int, finish_reason: FinishReason, tokens: Sequence[ScoredToken]
    ) -> ChatCompletionChunk:
        """The reason."""
        return self._chunk(
            ChatChunkChoice(
                index=index, delta={}, logprobs=chat_logprobs(tokens), finish_reason=finish_reason
            )
        )

    def usage(self, usage: Usage) -> ChatCompletionChunk:
        """No choice, only counts."""
        return ChatCompletionChunk(**self._head, choices=[], usage=usage)

    def _chunk(self, choice: ChatChunkChoice) -> ChatCompletionChunk:
        return ChatCompletionChunk(**self._head, choices=[choice])

    def _message(self, index: int, choice: Choice) -> AssistantMessage:
        calls = [
            MessageToolCall(
                id=self._call_id(index, number),
                function=FunctionCall(name=call.name, arguments=call.arguments),
            )
            for number, call in enumerate(choice.calls)
        ]
        content = choice.content
        return AssistantMessage(
            content=content or (None if calls else ""),
            reasoning_content=choice.reasoning or None,
            tool_calls=calls or None,
        )

    def _delta(self, index: int, delta: Delta) -> dict[str, JsonValue]:
        if isinstance(delta, CallDelta):
            call: dict[str, JsonValue] = {
                "index": delta.index,
                "id": self._call_id(index, delta.index),
                "type": "function",
                "function": {"name": delta.name, "arguments": ""},
            }
            return {"tool_calls": [call]}
        if isinstance(delta, ArgumentsDelta):
            return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}
        return {"reasoning_content" if isinstance(delta, ReasoningDelta) else "content": delta.text}

    def _call_id(self, index: int, number: int) -> str:
        return f"call_{self._request_id}_{index}_{number}"


class TextShape(AnswerShape):
    """Plain completions."""

    ID_PREFIX = "cmpl"

    def whole(self, choices: Sequence[Choice], usage: Usage) -> Completion:
        """The texts."""
        worded = [
            TextChoice(
                index=index,
                text=choice.content,
                logprobs=text_logprobs(choice.tokens),
                finish_reason=choice.finish_reason,
            )
            for index, choice in enumerate(choices)
        ]
        return Completion(**self._head, choices=worded, usage=usage)

    def opening(self, index: int) -> None:
        """Nothing."""

    def chunk(self, index: int, delta: Delta, tokens: Sequence[ScoredToken]) -> Completion:
        """A piece of the text."""
        text = "" if isinstance(delta, CallDelta) else delta.text
        return self._chunk(TextChoice(index=index, text=text, logprobs=text_logprobs(tokens)))

    def closing(self, index: int, finish_reason: FinishReason, tokens: Sequence[ScoredToken]) -> Completion:
        """The reason."""
        return self._chunk(
            TextChoice(index=index, text="", logprobs=text_logprobs(tokens), finish_reason=finish_reason)
        )

    def usage(self, usage: Usage) -> Completion:
        """No choice, only counts."""
        return Completion(**self._head, choices=[], usage=usage)

    def _chunk(self, choice: TextChoice) -> Completion:
        return Completion(**self._head, choices=[choice])
