"""Filler of many kinds, endless and cheap, and laying things to find among it at random places."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from forepage.suites.draw import Draw
from forepage.suites.wording.filler import ESSAY, NOISE, NOTES, RULER_NOISE, TALK

MIN_PAD = 4
"""Characters of the shortest sentence that fills a gap."""


class Style(StrEnum):
    """What filler reads like."""

    NOISE = "noise"
    ESSAY = "essay"
    NOTES = "notes"
    TALK = "talk"
    MIXED = "mixed"


class Prose:
    """Sentences of one style; noise repeats the same few for the whole document, as RULER's does."""

    def __init__(self, draw: Draw, style: Style) -> None:
        half = int(not draw.training)
        self._draw = draw
        self._patterns = {
            Style.NOISE: NOISE[half],
            Style.ESSAY: ESSAY[half],
            Style.NOTES: NOTES[half],
            Style.TALK: TALK[half],
            Style.MIXED: ESSAY[half] + NOTES[half] + TALK[half],
        }[style]
        self._cycle: list[str] = []
        self._at = 0
        if style is Style.NOISE:
            self._cycle = self._noise()

    def sentence(self) -> str:
        """The next sentence."""
        if self._cycle:
            self._at += 1
            return self._cycle[(self._at - 1) % len(self._cycle)]
        return self._draw.pick(self._patterns).expand(self._draw)

    def some(self, chars: int) -> str:
        """Sentences of at most so many characters, at least 85 % of them; the last may be cut at a word."""
        said: list[str] = []
        room = chars
        while room > 0:
            sentence = self.sentence()
            said.append(sentence)
            room -= len(sentence) + 1
        return cut(" ".join(said), chars)

    def _noise(self) -> list[str]:
        if self._draw.chance(0.3):
            return [RULER_NOISE]
        lines = [pattern.expand(self._draw) for pattern in self._draw.some(self._patterns, 5)]
        return [" ".join(lines)] if self._draw.chance(0.5) else lines


def cut(text: str, chars: int) -> str:
    """The beginning of a text, at most `chars` long, ended at a word and with a full stop."""
    if len(text) <= chars:
        return text
    if chars < MIN_PAD:
        return ""
    head = text[: chars - 1]
    return head[: max(head.rfind(" "), chars - 5)].rstrip(" ,;:.\n") + "."


@dataclass(frozen=True)
class Woven:
    """Filler with inserts: the text, and where each insert begins in it."""

    text: str
    starts: tuple[int, ...]


def weave(draw: Draw, prose: Prose, inserts: Sequence[str], chars: int) -> Woven:
    """Inserts in their given order at random places of filler; at most `chars`, short of it by under 10.

    The filler is empty where the inserts alone are longer than `chars`.
    """
    separators = draw.pick(SEPARATORS)
    room = chars - sum(map(len, inserts)) - len(inserts)
    pieces: list[str] = []
    while room > MIN_PAD:
        piece = prose.sentence() + draw.pick(separators)
        if len(piece) > room:
            piece = cut(piece.rstrip(), room - 1) + " "
            room = 0
        pieces.append(piece)
        room -= len(piece)
    places = sorted(draw.below(len(pieces) + 1) for _ in inserts)
    parts: list[str] = []
    starts: list[int] = []
    at = used = 0
    for place, insert in zip(places, inserts, strict=True):
        before = "".join(pieces[used:place])
        parts += [before, insert, "\n" if before.endswith("\n") else " "]
        at += len(before)
        starts.append(at)
        at += len(insert) + 1
        used = place
    parts.append("".join(pieces[used:]))
    return Woven("".join(parts).rstrip(), tuple(starts))


SEPARATORS = ((" ",), ("\n",), (" ", " ", " ", " ", "\n\n"), (" ", " ", "\n"))
"""What stands between sentences; one of these for a document, one of its members for each sentence."""
