"""DeepSeek-V4's chat layout as token ids: control tokens by id, every text encoded apart from them.

BOS, then each message: system text bare; `User` and the text; `Assistant`, `<think>` or `</think>`, the
text and EOS. The layout ends with an open assistant turn. Source: the encoding of the DeepSeek-V4
release, which gives no layout for an assistant that doesn't follow a user: here it is the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from forepage.errors import RequestError
from forepage.text.tokenizer import ControlToken, Tokenizer

TEXT_JOINER = "\n\n"
"""Between the texts of one turn: parts of a content list, and user messages that follow each other."""


class Role(StrEnum):
    """Who speaks."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


class ThinkingMode(StrEnum):
    """Whether the model reasons before it answers."""

    CHAT = "chat"
    THINKING = "thinking"


@dataclass(frozen=True)
class ChatMessage:
    """One message; `reasoning` is what an assistant thought before `text`."""

    role: Role
    text: str
    reasoning: str = ""


def message_from(
    index: int, role: str, content: str | Sequence[str] | None, reasoning: str | None = None
) -> ChatMessage:
    """Message `index` of a request. Raises: RequestError naming its role or content."""
    if role not in set(Role):
        known = ", ".join(Role)
        raise RequestError(f"this role is not supported; known are {known}", f"messages[{index}].role")
    if content is None:
        if role != Role.ASSISTANT:
            raise RequestError("content must be text", f"messages[{index}].content")
        content = ""
    text = content if isinstance(content, str) else TEXT_JOINER.join(content)
    return ChatMessage(Role(role), text, reasoning or "")


def encode_chat(
    messages: Sequence[ChatMessage], tokenizer: Tokenizer, mode: ThinkingMode = ThinkingMode.CHAT
) -> list[int]:
    """Ids of a conversation up to where the assistant speaks next.

    Reasoning of turns before the last user message is dropped, as the model was trained.
    Raises: RequestError when there is no message, or the assistant spoke last.
    """
    if not messages:
        raise RequestError("at least one message is needed", "messages")
    if messages[-1].role is Role.ASSISTANT:
        last = len(messages) - 1
        raise RequestError("the last message can't be the assistant's", f"messages[{last}].role")
    ids: list[int] = []
    for part in _parts(_turns(messages), mode):
        if isinstance(part, ControlToken):
            ids.append(tokenizer.token_id(part))
        elif part:
            ids.extend(tokenizer.encode_text(part))
    return ids


def _turns(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Users' messages that follow each other are one turn; so are system texts."""
    turns: list[ChatMessage] = []
    for message in messages:
        if turns and turns[-1].role is message.role and message.role is not Role.ASSISTANT:
            joiner = TEXT_JOINER if message.role is Role.USER else ""
            turns[-1] = replace(turns[-1], text=turns[-1].text + joiner + message.text)
        else:
            turns.append(message)
    return turns


def _parts(turns: Sequence[ChatMessage], mode: ThinkingMode) -> Iterator[str | ControlToken]:
    """The layout: control tokens and texts in order."""
    last_user = max((index for index, turn in enumerate(turns) if turn.role is Role.USER), default=-1)
    yield ControlToken.BOS
    for index, turn in enumerate(turns):
        if turn.role is Role.SYSTEM:
            yield turn.text
        elif turn.role is Role.USER:
            yield ControlToken.USER
            yield turn.text
        else:
            yield ControlToken.ASSISTANT
            if mode is ThinkingMode.THINKING and index > last_user:
                yield ControlToken.THINK
                yield turn.reasoning
            yield ControlToken.END_THINK
            yield turn.text
            yield ControlToken.EOS
    yield ControlToken.ASSISTANT
    yield ControlToken.THINK if mode is ThinkingMode.THINKING else ControlToken.END_THINK
