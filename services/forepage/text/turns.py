"""Messages as the turns of the chat layout: what one speaker says in a row, tool results among it.

A tool's result is said by the user. Pure.
"""

from collections.abc import Sequence
from dataclasses import replace

from forepage.text.messages import ChatMessage, Role

TEXT_JOINER = "\n\n"
"""Between the texts of one turn: tool results, and what a user writes."""


def turns_of(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Tools and users that follow each other are one user turn; system texts are one, unseparated."""
    turns: list[ChatMessage] = []
    for message in in_call_order(messages):
        turn = as_user(message) if message.role is Role.TOOL else message
        if turns and _joins(turns[-1], turn):
            turns[-1] = _joined(turns[-1], turn)
        else:
            turns.append(turn)
    return turns


def in_call_order(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Results that follow each other, in the order of the calls before them; unknown calls come last."""
    ordered: list[ChatMessage] = []
    run: list[ChatMessage] = []
    order: dict[str, int] = {}
    for message in messages:
        if message.role is Role.TOOL:
            run.append(message)
            continue
        ordered += sorted(run, key=lambda item: order.get(item.call_id, len(order)))
        run = []
        if message.calls:
            order = {call.call_id: index for index, call in enumerate(message.calls)}
        ordered.append(message)
    return ordered + sorted(run, key=lambda item: order.get(item.call_id, len(order)))


def as_user(message: ChatMessage) -> ChatMessage:
    """A tool's result as the user says it."""
    return ChatMessage(Role.USER, f"<tool_result>{message.text}</tool_result>")


def _joins(before: ChatMessage, message: ChatMessage) -> bool:
    return before.role is message.role and message.role in (Role.USER, Role.SYSTEM) and before.task is None


def _joined(before: ChatMessage, message: ChatMessage) -> ChatMessage:
    joiner = TEXT_JOINER if message.role is Role.USER else ""
    return replace(message, text=before.text + joiner + message.text)
