"""An answer's text as it comes: reasoning, content and tool calls told apart.

Tolerant: it never raises, and no text is lost. Only complete, well-formed markup disappears; whatever
is not what it began to look like is shown as the text it is, where it stands. What comes out in all
doesn't depend on how the text was cut into calls of `feed`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from forepage.text.call_arguments import CallArguments, ValueKind
from forepage.text.control_tokens import ControlToken
from forepage.text.dsml import (
    BEFORE_CALLS,
    CALLS_CLOSE,
    CALLS_OPEN,
    INVOKE_CLOSE,
    INVOKE_OPEN,
    PARAMETER_CLOSE,
    PARAMETER_OPEN,
)
from forepage.text.dsml_tags import find_first, may_become_tag, num_held, read_tag
from forepage.text.messages import ThinkingMode

SPACES = " \t\r\n"
MAX_SPACES = 1024
"""More between tags are not the markup's: a model that goes astray must not fill the buffer."""
BLOCK_MARKS = (BEFORE_CALLS + CALLS_OPEN, BEFORE_CALLS[1:] + CALLS_OPEN)
"""A block with the newlines before it that belong to it."""
CALL_ENDS = (INVOKE_CLOSE, CALLS_CLOSE)
VALUE_ENDS = (PARAMETER_CLOSE, *CALL_ENDS)
"""What ends a value: its own closing tag, or an outer one where that was left out."""


@dataclass(frozen=True)
class ReasoningDelta:
    """More of what the model thinks."""

    text: str


@dataclass(frozen=True)
class ContentDelta:
    """More of what it says."""

    text: str


@dataclass(frozen=True)
class CallDelta:
    """A call begins, the `index`-th of this answer."""

    index: int
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """More of a call's arguments: pieces of one JSON object."""

    index: int
    text: str


Delta = ReasoningDelta | ContentDelta | CallDelta | ArgumentsDelta


class _State(Enum):
    TEXT = auto()  # reasoning or content
    BLOCK = auto()  # between calls
    CALL = auto()  # between the values of a call
    STRAY = auto()  # there, in text that belongs nowhere
    VALUE = auto()


class AnswerParser:
    """One answer. `with_tools`: calls are looked for; behind `max_calls` of them the answer has `ended`."""

    def __init__(self, mode: ThinkingMode, *, with_tools: bool, max_calls: int | None = None) -> None:
        self._thinks = mode is ThinkingMode.THINKING
        self._with_tools = with_tools
        self._max_calls = max_calls
        self._state = _State.TEXT
        self._buffer = ""
        self._undecided = ""  # a block's opening, until its first call is certain
        self._arguments = CallArguments()
        self._value_ends: Sequence[str] = VALUE_ENDS
        self._is_last = False
        self._out: list[Delta] = []
        self._steps: dict[_State, Callable[[], bool]] = {
            _State.TEXT: self._text,
            _State.BLOCK: self._block,
            _State.CALL: self._call,
            _State.STRAY: self._stray,
            _State.VALUE: self._value,
        }
        self.num_calls = 0
        self.ended = False

    def feed(self, text: str) -> list[Delta]:
        """What this text makes certain."""
        self._buffer += text
        while not self.ended and self._steps[self._state]():
            pass
        out, self._out = self._out, []
        return out

    def finish(self, *, complete: bool) -> list[Delta]:
        """What was held back. `complete`: the model ended here by itself, so a call left open is closed.

        A call that was cut off stays open: its arguments are no valid JSON, and nobody runs half a call.
        """
        self._is_last = True
        out = self.feed("")
        if self.ended:
            return out
        if self._state is _State.VALUE:
            self._argue(self._arguments.end() if complete else self._arguments.cut())
        if complete and self._state in (_State.VALUE, _State.CALL, _State.STRAY):
            self._argue(self._arguments.close())
        self.ended = True
        return out + self._out

    def _text(self) -> bool:
        marks = [ControlToken.END_THINK] if self._thinks else []
        block_marks = [CALLS_OPEN, *BLOCK_MARKS] if self._with_tools else []
        found = find_first(self._buffer, marks + block_marks[:1])
        if found is None:
            held = 0 if self._is_last else num_held(self._buffer, marks + block_marks)
            self._say(self._take(len(self._buffer) - held))
            return False
        at, mark = found
        before = self._take(at)
        self._take(len(mark))
        if mark == ControlToken.END_THINK:
            self._say(before)
            self._thinks = False
        else:
            said = before.removesuffix("\n").removesuffix("\n")
            self._say(said)
            self._undecided = before[len(said) :] + mark
            self._state = _State.BLOCK
        return True

    def _block(self) -> bool:
        rest = self._buffer.lstrip(SPACES)
        spaces = len(self._buffer) - len(rest)
        if spaces > MAX_SPACES:
            return self._leave_block()
        if tag := read_tag(rest, INVOKE_OPEN):
            self._take(spaces + tag.length)
            self._begin_call(tag.attributes["name"])
            return True
        if rest.startswith(CALLS_CLOSE) and not self._undecided:
            self._take(spaces + len(CALLS_CLOSE))
            self._state = _State.TEXT
            return True
        is_open = may_become_tag(rest, INVOKE_OPEN) or _may_become(rest, CALLS_CLOSE)
        if is_open and not (self._is_last and (rest or self._undecided)):
            return False
        return self._leave_block()

    def _leave_block(self) -> bool:
        """It is none after all; nor is what follows, unless it begins anew."""
        self._say(self._undecided)
        self._undecided = ""
        self._state = _State.TEXT
        return True

    def _call(self) -> bool:
        rest = self._buffer.lstrip(SPACES)
        spaces = len(self._buffer) - len(rest)
        if spaces > MAX_SPACES:
            self._state = _State.STRAY
        elif tag := read_tag(rest, PARAMETER_OPEN):
            self._take(spaces + tag.length)
            is_text = tag.attributes.get("string", "true").lower() != "false"
            self._begin_value(ValueKind.TEXT if is_text else ValueKind.JSON, tag.attributes["name"])
        elif rest.startswith(CALL_ENDS) or read_tag(rest, INVOKE_OPEN):
            self._take(spaces + (len(INVOKE_CLOSE) if rest.startswith(INVOKE_CLOSE) else 0))
            self._end_call()
        elif rest.startswith("{") and self._arguments.is_empty:
            self._take(spaces)
            self._begin_value(ValueKind.ALL)
        else:
            tags = any(may_become_tag(rest, opening) for opening in (PARAMETER_OPEN, INVOKE_OPEN))
            is_open = tags or any(_may_become(rest, end) for end in CALL_ENDS)
            if is_open and not (self._is_last and rest):
                return False
            self._say(self._take(spaces + 1))
            self._state = _State.STRAY
        return True

    def _stray(self) -> bool:
        at = self._buffer.find("<")
        self._say(self._take(at if at >= 0 else len(self._buffer)))
        if at >= 0:
            self._state = _State.CALL
        return at >= 0

    def _value(self) -> bool:
        found = find_first(self._buffer, self._value_ends)
        if found is None:
            held = 0 if self._is_last else num_held(self._buffer, self._value_ends)
            self._argue(self._arguments.more(self._take(len(self._buffer) - held)))
            return False
        at, end = found
        self._argue(self._arguments.more(self._take(at)) + self._arguments.end())
        self._take(len(end) if end == PARAMETER_CLOSE else 0)
        self._state = _State.CALL
        return True

    def _begin_call(self, name: str) -> None:
        self._undecided = ""
        self._thinks = False  # a call ends the reasoning: the model sometimes forgets to close it
        self._out.append(CallDelta(self.num_calls, name))
        self.num_calls += 1
        self._arguments = CallArguments()
        self._state = _State.CALL

    def _begin_value(self, kind: ValueKind, name: str = "") -> None:
        self._argue(self._arguments.begin(kind, name))
        self._value_ends = CALL_ENDS if kind is ValueKind.ALL else VALUE_ENDS
        self._state = _State.VALUE

    def _end_call(self) -> None:
        self._argue(self._arguments.close())
        self._state = _State.BLOCK
        self.ended = self.num_calls == self._max_calls

    def _take(self, length: int) -> str:
        taken, self._buffer = self._buffer[:length], self._buffer[length:]
        return taken

    def _say(self, text: str) -> None:
        if text:
            self._out.append(ReasoningDelta(text) if self._thinks else ContentDelta(text))

    def _argue(self, text: str) -> None:
        if text:
            self._out.append(ArgumentsDelta(self.num_calls - 1, text))


def _may_become(text: str, mark: str) -> bool:
    return mark.startswith(text)
