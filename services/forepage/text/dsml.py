"""DSML, the markup of tool calls: names of its tags, and calls of earlier turns written in it.

`｜DSML｜` is one control token; everything around it is text.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from forepage.text.control_tokens import ControlToken
from forepage.text.messages import ToolCall

DSML = ControlToken.DSML
CALLS, INVOKE, PARAMETER = "tool_calls", "invoke", "parameter"
CALLS_OPEN, CALLS_CLOSE = f"<{DSML}{CALLS}>", f"</{DSML}{CALLS}>"
INVOKE_OPEN, INVOKE_CLOSE = f"<{DSML}{INVOKE} ", f"</{DSML}{INVOKE}>"
PARAMETER_OPEN, PARAMETER_CLOSE = f"<{DSML}{PARAMETER} ", f"</{DSML}{PARAMETER}>"
BEFORE_CALLS = "\n\n"
"""Between what an assistant says and its calls."""

Part = str | ControlToken
"""A piece of a layout: text, or a control token."""


def to_json(value: Any) -> str:
    """JSON as the model reads it: on one line, letters of any script as they are."""
    return json.dumps(value, ensure_ascii=False)


def call_parts(calls: tuple[ToolCall, ...]) -> Iterator[Part]:
    """A block of calls, without what stands before it."""
    yield from ("<", DSML, f"{CALLS}>\n")
    for call in calls:
        yield from ("<", DSML, f'{INVOKE} name="{call.name}">\n')
        yield from _argument_parts(call.arguments)
        yield from ("\n</", DSML, f"{INVOKE}>\n")
    yield from ("</", DSML, f"{CALLS}>")


def _argument_parts(arguments: Mapping[str, Any]) -> Iterator[Part]:
    for index, (name, value) in enumerate(arguments.items()):
        is_text = isinstance(value, str)
        flag, shown = ("true", value) if is_text else ("false", to_json(value))
        yield from ("\n<" if index else "<", DSML)
        yield f'{PARAMETER} name="{name}" string="{flag}">{shown}</'
        yield from (DSML, f"{PARAMETER}>")
