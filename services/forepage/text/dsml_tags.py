"""Finding DSML in text that is still coming: what is a tag, what may become one, what is none. Pure.

Every answer depends only on what has come, and never changes with what comes later.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

MAX_TAG_CHARS = 1024
"""A tag that doesn't end within this is none."""
TAG_END = '">'

_ATTRIBUTE = re.compile(r'(\w+)="(.*?)"(?=\s+\w+="|\s*$)')


@dataclass(frozen=True)
class Tag:
    """An opening tag of `length` characters."""

    attributes: dict[str, str]
    length: int


def read_tag(text: str, opening: str) -> Tag | None:
    """The tag that `text` begins with, if it is complete and has a name. Names may hold quotes."""
    end = text.find(TAG_END, len(opening), MAX_TAG_CHARS)
    if not text.startswith(opening) or end < 0 or "\n" in text[:end]:
        return None
    attributes = dict(_ATTRIBUTE.findall(text[len(opening) : end + 1]))
    return Tag(attributes, end + len(TAG_END)) if attributes.get("name") else None


def may_become_tag(text: str, opening: str) -> bool:
    """Whether `text` is the beginning of a tag that isn't complete."""
    if len(text) <= len(opening):
        return opening.startswith(text)
    is_open = text.startswith(opening) and TAG_END not in text[len(opening) :] and "\n" not in text
    return is_open and len(text) < MAX_TAG_CHARS


def find_first(text: str, marks: Iterable[str]) -> tuple[int, str] | None:
    """Where the first of the marks stands, and which it is."""
    return min(((at, mark) for mark in marks if (at := text.find(mark)) >= 0), default=None)


def num_held(text: str, marks: Iterable[str]) -> int:
    """Length of the longest end of `text` that may become one of the marks."""
    marks = tuple(marks)
    longest = max((len(mark) for mark in marks), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        if any(mark.startswith(text[-length:]) for mark in marks):
            return length
    return 0
