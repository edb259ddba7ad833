"""A chat body as the conversation that the layout takes; what doesn't fit together is refused by name.

Pure. A tool message answers a call of the assistant turn before it, and every call is answered.
"""

import json
from collections.abc import Sequence
from typing import Any

from forepage.errors import RequestError
from forepage.gateway.chat_schemas import ChatBody, ChatMessageFields, NamedTool, ToolCallFields
from forepage.text.messages import ChatMessage, Conversation, Effort, Role, ThinkingMode, ToolCall
from forepage.text.turns import TEXT_JOINER

EFFORT_OF = {
    "low": Effort.HIGH,  # the model knows two; these names are OpenAI's
    "medium": Effort.HIGH,
    "high": Effort.HIGH,
    "xhigh": Effort.MAX,
    "max": Effort.MAX,
}


def conversation_of(body: ChatBody) -> Conversation:
    """The conversation. Raises: RequestError naming the field that doesn't fit."""
    messages = [_message(item, f"messages[{index}]") for index, item in enumerate(body.messages)]
    _check_calls(messages)
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
    _check_choice(body)
    switches = body.chat_template_kwargs
    return Conversation(
        messages,
        tools=_tools(body),
        mode=thinking_mode(body),
        effort=EFFORT_OF.get(body.reasoning_effort or "", Effort.HIGH),
        drop_thinking=switches is None or switches.drop_thinking is not False,
        response_format=body.answer_schema or None,
    )


def thinking_mode(body: ChatBody) -> ThinkingMode:
    """Thinking when the switch or an effort asks for it. Raises: RequestError when they contradict."""
    effort = body.reasoning_effort
    switch = body.chat_template_kwargs.thinking if body.chat_template_kwargs else None
    asks = effort in EFFORT_OF
    if switch is not None and effort is not None and switch != asks:
        raise RequestError("chat_template_kwargs.thinking says otherwise", "reasoning_effort")
    thinks = asks if switch is None else switch
    return ThinkingMode.THINKING if thinks else ThinkingMode.CHAT


def _message(item: ChatMessageFields, field: str) -> ChatMessage:
    role = item.role
    if item.texts is None and role is not Role.ASSISTANT:
        raise RequestError("content must be text", f"{field}.content")
    if role is Role.TOOL and not item.tool_call_id:
        raise RequestError("a tool message says which call it answers", f"{field}.tool_call_id")
    if item.tool_calls and role is not Role.ASSISTANT:
        raise RequestError("only an assistant calls tools", f"{field}.tool_calls")
    calls = enumerate(item.tool_calls or ())
    return ChatMessage(
        role,
        TEXT_JOINER.join(item.texts or ()),
        reasoning=(item.reasoning_content or "") if role is Role.ASSISTANT else "",
        calls=tuple(_call(call, f"{field}.tool_calls[{index}]") for index, call in calls),
        call_id=(item.tool_call_id or "") if role is Role.TOOL else "",
        task=item.task,
        url=item.extracted_url or "",
    )


def _call(call: ToolCallFields, field: str) -> ToolCall:
    where = f"{field}.function.arguments"
    try:
        arguments: Any = json.loads(call.function.arguments or "{}")
        json.dumps(arguments, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # a lone surrogate among them
        raise RequestError("must be a JSON object, as text", where) from None
    if not isinstance(arguments, dict):
        raise RequestError("must be a JSON object, as text", where)
    return ToolCall(call.id, call.function.name, arguments)


def _check_calls(messages: Sequence[ChatMessage]) -> None:
    """Tool messages follow the assistant that called, one for each call."""
    open_calls: set[str] = set()
    asked_at = 0
    for index, message in enumerate(messages):
        if message.role is Role.TOOL:
            if message.call_id not in open_calls:
                raise RequestError(
                    "answers no call of the assistant message before it, or answers one twice",
                    f"messages[{index}].tool_call_id",
                )
            open_calls.discard(message.call_id)
            continue
        if open_calls:
            raise _unanswered(asked_at)
        open_calls, asked_at = {call.call_id for call in message.calls}, index
        if len(open_calls) < len(message.calls):
            raise RequestError("ids of calls must differ", f"messages[{index}].tool_calls")
    if open_calls:
        raise _unanswered(asked_at)


def _check_choice(body: ChatBody) -> None:
    """What must be called is there."""
    if isinstance(body.tool_choice, NamedTool) and not body.forced_tools:
        raise RequestError("no tool has this name", "tool_choice.function.name")
    if body.tool_choice == "required" and not body.forced_tools:
        raise RequestError("there are no tools of which one could be called", "tool_choice")


def _unanswered(index: int) -> RequestError:
    return RequestError(
        "each call needs a tool message that answers it, directly behind", f"messages[{index}].tool_calls"
    )


def _tools(body: ChatBody) -> tuple[dict[str, Any], ...]:
    names: set[str] = set()
    for index, tool in enumerate(body.offered_tools):
        if tool.function.name in names:
            raise RequestError("names of tools must differ", f"tools[{index}].function.name")
        names.add(tool.function.name)
    return tuple(tool.function.as_sent for tool in body.offered_tools)
