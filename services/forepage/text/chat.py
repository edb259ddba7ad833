"""DeepSeek-V4's chat layout: control tokens by id, every text encoded apart from them.

BOS, then each turn: system text bare; `User` and the text; `Assistant`, `<think>` or `</think>`, the
text, its tool calls and EOS. The layout ends where the assistant speaks next. Written from a description
of the release's encoding. Where that gives no layout, for an assistant that doesn't follow a user, it is
the same as after a user; and developers' messages are never forgotten.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

from forepage.errors import RequestError
from forepage.text.control_tokens import ControlToken
from forepage.text.dsml import BEFORE_CALLS, Part, call_parts, to_json
from forepage.text.messages import ChatMessage, Conversation, Effort, Role, Task, ThinkingMode
from forepage.text.tokenizer import Tokenizer
from forepage.text.turns import turns_of
from forepage.text.wording import SCHEMA_MARK, SCHEMAS_MARK, Wording

BLOCK_JOINER = "\n\n"
"""Before a block of tools or of a response format."""

TOKEN_OF_TASK = {task: ControlToken[task.name] for task in Task}
ASKING = (Role.USER, Role.DEVELOPER)
"""Who speaks in a user's turn."""

TASKS_OF_USER = (Task.QUERY, Task.AUTHORITY, Task.DOMAIN, Task.READ_URL)
"""These are asked in the user's turn; `action` is asked where the assistant begins, `title` behind it."""

_CONTROL = re.compile("(" + "|".join(map(re.escape, ControlToken)) + ")")


def encode_parts(parts: Iterable[Part], tokenizer: Tokenizer) -> list[int]:
    """Ids of a layout. Raises: KeyError for a control token that the tokenizer lacks."""
    ids: list[int] = []
    for part in parts:
        ids += [tokenizer.token_id(part)] if isinstance(part, ControlToken) else tokenizer.encode_text(part)
    return ids


def chat_parts(conversation: Conversation, wording: Wording) -> list[Part]:
    """The layout; no text is empty, and none follows another: they are encoded as one.

    Raises: RequestError naming the field that makes it impossible.
    """
    check(conversation, wording)
    return _merged(_layout(conversation, wording))


def check(conversation: Conversation, wording: Wording) -> None:
    """Raises: RequestError unless there is a message, an end to answer, and what the effort needs."""
    messages = conversation.messages
    if not messages:
        raise RequestError("at least one message is needed", "messages")
    last = len(messages) - 1
    for index, message in enumerate(messages):
        if message.task is not None:
            _check_task(message, f"messages[{index}].task", is_last=index == last)
    if messages[-1].role is Role.ASSISTANT and messages[-1].task is None:
        raise RequestError("the last message can't be the assistant's", f"messages[{last}].role")
    if conversation.effort is Effort.MAX and wording.max_effort is None:
        raise RequestError("max is not available: this model folder has no text for it", "reasoning_effort")


def missing_token(conversation: Conversation, tokenizer: Tokenizer) -> str | None:
    """The field that needs a control token which this tokenizer lacks, if there is one."""
    for token, field in _special_needs(conversation):
        if not tokenizer.has_token(token):
            return field
    return None


def _special_needs(conversation: Conversation) -> Iterator[tuple[ControlToken, str]]:
    if conversation.tools:
        yield ControlToken.DSML, "tools"
    for index, message in enumerate(conversation.messages):
        if message.role is Role.LATEST_REMINDER:
            yield ControlToken.LATEST_REMINDER, f"messages[{index}].role"
        if message.calls:
            yield ControlToken.DSML, f"messages[{index}].tool_calls"
        if message.task is not None:
            yield TOKEN_OF_TASK[message.task], f"messages[{index}].task"
        if message.task is Task.READ_URL:
            yield ControlToken.EXTRACTED_URL, f"messages[{index}].task"


def _check_task(message: ChatMessage, field: str, *, is_last: bool) -> None:
    speakers = (Role.ASSISTANT,) if message.task is Task.TITLE else ASKING
    if message.role not in speakers:
        raise RequestError(f"this task is asked with a message of: {', '.join(speakers)}", field)
    if not is_last:
        raise RequestError("a task is asked with the last message", field)
    if (message.task is Task.READ_URL) != bool(message.url):
        raise RequestError("read_url, and only it, needs the message's extracted_url", field)


def _layout(conversation: Conversation, wording: Wording) -> Iterator[Part]:
    thinking = conversation.mode is ThinkingMode.THINKING
    if conversation.with_bos:
        yield ControlToken.BOS
    if thinking and conversation.effort is Effort.MAX and wording.max_effort is not None:
        yield wording.max_effort
    turns = turns_of(conversation.messages)
    blocks_at = next((i for i, turn in enumerate(turns) if turn.role in (Role.SYSTEM, Role.DEVELOPER)), None)
    if blocks_at is None:
        yield from _blocks(conversation, wording)
    forgets = conversation.drop_thinking and not conversation.tools
    last_user = max((i for i, turn in enumerate(turns) if turn.role in ASKING), default=-1)
    opened = False  # the assistant's turn, or a task that stands for it
    for index, turn in enumerate(turns):
        thinks = thinking and not (forgets and index < last_user)
        if turn.role is Role.ASSISTANT:
            if not opened:
                yield from _opener(thinks=thinks)
            yield from _spoken(turn, thinks=thinks)
            opened = turn.task is not None
        elif turn.role is Role.LATEST_REMINDER:
            if index and turns[index - 1].role in ASKING and _answered(turns[index + 1 :]):
                yield from _opener(thinks=thinks)
                opened = True
            yield from (ControlToken.LATEST_REMINDER, turn.text)
        else:
            opened = turn.task in TASKS_OF_USER
            yield from _heard(turn)
            if index == blocks_at:
                yield from _blocks(conversation, wording)
        if turn.task is Task.ACTION:
            yield from _opener(thinks=thinking)
            opened = True
        if turn.task is not None:
            yield TOKEN_OF_TASK[turn.task]
    if not opened:
        yield from _opener(thinks=thinking)


def _answered(rest: Sequence[ChatMessage]) -> bool:
    """Whether the assistant is the next to speak."""
    return not rest or rest[0].role is Role.ASSISTANT


def _opener(*, thinks: bool) -> tuple[ControlToken, ControlToken]:
    return ControlToken.ASSISTANT, ControlToken.THINK if thinks else ControlToken.END_THINK


def _spoken(turn: ChatMessage, *, thinks: bool) -> Iterator[Part]:
    """What an assistant said, behind its opener."""
    if thinks:
        yield from (turn.reasoning, ControlToken.END_THINK)
    yield turn.text
    if turn.calls:
        yield BEFORE_CALLS
        yield from call_parts(turn.calls)
    yield ControlToken.EOS


def _heard(turn: ChatMessage) -> Iterator[Part]:
    """What the assistant is told."""
    if turn.role is not Role.SYSTEM:
        yield ControlToken.USER
    yield turn.text
    if turn.url:
        yield from (ControlToken.EXTRACTED_URL, turn.url)


def _blocks(conversation: Conversation, wording: Wording) -> Iterator[Part]:
    """Tools and response format: behind the first system or developer text, else before all turns."""
    if conversation.tools:
        yield BLOCK_JOINER
        yield from _filled(wording.tools, SCHEMAS_MARK, "\n".join(map(to_json, conversation.tools)))
    if conversation.response_format is not None:
        yield BLOCK_JOINER
        yield from _filled(wording.response_format, SCHEMA_MARK, to_json(conversation.response_format))


def _filled(template: str, mark: str, text: str) -> Iterator[Part]:
    """The operator's template with a client's text in it; only the template's control tokens are such."""
    before, _, after = template.partition(mark)
    yield from _spelled(before)
    yield text
    yield from _spelled(after)


def _spelled(text: str) -> Iterator[Part]:
    for index, piece in enumerate(_CONTROL.split(text)):
        yield ControlToken(piece) if index % 2 else piece


def _merged(parts: Iterable[Part]) -> list[Part]:
    merged: list[Part] = []
    texts: list[str] = []
    for part in parts:
        if not isinstance(part, ControlToken):
            texts.append(part)
            continue
        if text := "".join(texts):
            merged.append(text)
        texts.clear()
        merged.append(part)
    return [*merged, text] if (text := "".join(texts)) else merged
