"""Bytes and JSON as an outside world may send them: almost right, cut off, nested without end, or noise."""

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

NESTED = 200_000
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Cut off, a few bytes changed, a piece left out or doubled, or nothing of it at all."""
    at = draw(st.integers(0, len(whole)))
    match draw(st.sampled_from(("cut", "change", "drop", "double", "noise"))):
        case "cut":
            return whole[:at]
        case "change":
            piece = draw(st.binary(min_size=1, max_size=4))
            return whole[:at] + piece + whole[at + len(piece) :]
        case "drop":
            return whole[:at] + whole[at + draw(st.integers(1, 9)) :]
        case "double":
            size = draw(st.integers(1, 40))
            return whole[:at] + whole[at : at + size] + whole[at:]
    return draw(st.binary(max_size=200))


@st.composite
def altered(draw: st.DrawFn, document: Any) -> Any:
    """A JSON document with one place replaced by anything, or left out."""
    document = copy.deepcopy(document)
    places = list(_places(document))
    holder, key = draw(st.sampled_from(places))
    if isinstance(holder, dict) and draw(st.booleans()):
        del holder[key]
    else:
        holder[key] = draw(VALUES)
    return document


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value; of long lists and maps only the first few."""
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for number, (key, value) in enumerate(list(items)):
            if number < 40:
                yield node, key
                yield from _places(value)


def nested_json() -> bytes:
    """Valid JSON that no recursive parser gets through."""
    return b"[" * NESTED + b"]" * NESTED


def as_json(document: Any) -> bytes:
    """Its text, also of NaN and infinities."""
    return json.dumps(document).encode()
