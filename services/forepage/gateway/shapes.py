"""How each endpoint words one answer, whole or in chunks."""

from abc import ABC, abstractmethod
from typing import ClassVar

from pydantic import BaseModel

from forepage.gateway.replies import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    FinishReason,
    ReplyHead,
    TextChoice,
    Usage,
)


class AnswerShape(ABC):
    """How one endpoint words one answer."""

    ID_PREFIX: ClassVar[str]

    def __init__(self, *, request_id: str, created: int, model: str, fingerprint: str) -> None:
        self._head = ReplyHead(
            id=f"{self.ID_PREFIX}-{request_id}", created=created, model=model, system_fingerprint=fingerprint
        ).model_dump()

    @abstractmethod
    def whole(self, text: str, finish_reason: FinishReason, usage: Usage) -> BaseModel:
        """The answer in one."""

    @abstractmethod
    def chunk(self, text: str | None, finish_reason: FinishReason | None = None) -> BaseModel:
        """A piece of it; None for the last, which only says why it ended."""

    @abstractmethod
    def opening(self) -> BaseModel | None:
        """What comes before any text."""

    @abstractmethod
    def usage(self, usage: Usage) -> BaseModel:
        """The event after the last piece."""


class ChatShape(AnswerShape):
    """Chat."""

    ID_PREFIX = "chatcmpl"

    def whole(self, text: str, finish_reason: FinishReason, usage: Usage) -> ChatCompletion:
        """The message."""
        choice = ChatChoice(message=AssistantMessage(content=text), finish_reason=finish_reason)
        return ChatCompletion(**self._head, choices=[choice], usage=usage)

    def chunk(self, text: str | None, finish_reason: FinishReason | None = None) -> ChatCompletionChunk:
        """A piece of the content."""
        choice = ChatChunkChoice(delta={} if text is None else {"content": text}, finish_reason=finish_reason)
        return ChatCompletionChunk(**self._head, choices=[choice])

    def opening(self) -> ChatCompletionChunk:
        """The role."""
        choice = ChatChunkChoice(delta={"role": "assistant", "content": ""})
        return ChatCompletionChunk(**self._head, choices=[choice])

    def usage(self, usage: Usage) -> ChatCompletionChunk:
        """No choice, only counts."""
        return ChatCompletionChunk(**self._head, choices=[], usage=usage)


class TextShape(AnswerShape):
    """Plain completions."""

    ID_PREFIX = "cmpl"

    def whole(self, text: str, finish_reason: FinishReason, usage: Usage) -> Completion:
        """The text."""
        return Completion(
            **self._head, choices=[TextChoice(text=text, finish_reason=finish_reason)], usage=usage
        )

    def chunk(self, text: str | None, finish_reason: FinishReason | None = None) -> Completion:
        """A piece of the text."""
        return Completion(**self._head, choices=[TextChoice(text=text or "", finish_reason=finish_reason)])

    def opening(self) -> None:
        """Nothing."""

    def usage(self, usage: Usage) -> Completion:
        """No choice, only counts."""
        return Completion(**self._head, choices=[], usage=usage)
