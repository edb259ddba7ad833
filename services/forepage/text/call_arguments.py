"""A tool call's parameters as the pieces of one JSON object, which clients concatenate.

Texts pass through as they come. Other values are held until they are whole: one that is no JSON after
all becomes a JSON text, so that a call that was closed always has valid arguments.
"""

import json
from enum import Enum, auto

from forepage.text.dsml import to_json


class ValueKind(Enum):
    """What a value is: a text, JSON, or all arguments at once as the model wrote them."""

    TEXT = auto()
    JSON = auto()
    ALL = auto()


class CallArguments:
    """The arguments of one call. Each verb returns the piece that it adds."""

    def __init__(self) -> None:
        self._kind: ValueKind | None = None
        self._held: list[str] = []
        self._is_object_open = False
        self._is_whole = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing came yet."""
        return not self._is_object_open and not self._is_whole

    def begin(self, kind: ValueKind, name: str = "") -> str:
        """A value begins."""
        self._kind = kind
        if kind is ValueKind.ALL:
            self._is_whole = True
            return ""
        before = ", " if self._is_object_open else "{"
        self._is_object_open = True
        return f"{before}{to_json(name)}: " + ('"' if kind is ValueKind.TEXT else "")

    def more(self, text: str) -> str:
        """More of the value."""
        if self._kind is ValueKind.TEXT:
            return to_json(text)[1:-1]
        if self._kind is ValueKind.ALL:
            return text
        self._held.append(text)
        return ""

    def end(self) -> str:
        """The value is complete."""
        kind, self._kind = self._kind, None
        if kind is ValueKind.TEXT:
            return '"'
        value = self._take()
        return "" if kind is ValueKind.ALL else value if _is_json(value) else to_json(value)

    def cut(self) -> str:
        """No more of the value will come: what was held, as it is."""
        return self._take()

    def close(self) -> str:
        """The call is complete."""
        if self._is_whole:
            return ""
        return "}" if self._is_object_open else "{}"

    def _take(self) -> str:
        held = "".join(self._held)
        self._held.clear()
        return held


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
