"""A conversation as values: who says what, which tools are called, how the model is to answer.

Made by whoever takes requests, read by the chat layout (`chat`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Role(StrEnum):
    """Who speaks. `latest_reminder` is what the model should know of now: date, place, language."""

    SYSTEM = "system"
    DEVELOPER = "developer"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"
    LATEST_REMINDER = "latest_reminder"


class ThinkingMode(StrEnum):
    """Whether the model reasons before it answers."""

    CHAT = "chat"
    THINKING = "thinking"


class Effort(StrEnum):
    """How hard it reasons."""

    HIGH = "high"
    MAX = "max"


class Task(StrEnum):
    """A short auxiliary answer about the conversation instead of a reply to it."""

    ACTION = "action"
    QUERY = "query"
    AUTHORITY = "authority"
    DOMAIN = "domain"
    TITLE = "title"
    READ_URL = "read_url"


@dataclass(frozen=True)
class ToolCall:
    """One call of an assistant; `arguments` is JSON by name."""

    call_id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class ChatMessage:
    """One message. `reasoning` and `calls` are an assistant's, `call_id` says what a tool answers."""

    role: Role
    text: str
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    call_id: str = ""
    task: Task | None = None
    url: str = ""


@dataclass(frozen=True)
class Conversation:
    """What is encoded. `tools` are OpenAI's function objects, `response_format` is a JSON schema.

    `drop_thinking`: reasoning from before the last user is forgotten, unless there are tools.
    """

    messages: Sequence[ChatMessage]
    tools: Sequence[Mapping[str, Any]] = ()
    response_format: Mapping[str, Any] | None = None
    mode: ThinkingMode = ThinkingMode.CHAT
    effort: Effort = Effort.HIGH
    drop_thinking: bool = True
    with_bos: bool = True
