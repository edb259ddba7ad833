"""Sentences with alternatives: "[The|Its] {attribute} [for|of] {key} is {value}." stands for four sentences.

`[a|b|]` draws one alternative (they nest), `{name}` takes a value that is given, `<noun>` a drawn word.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from forepage.suites.draw import Draw

TOKEN = re.compile(r"[\[\]|]|\{\w+\}|<\w+>|[^\[\]|{}<>]+|[{}<>]")
ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")
NO_VALUES: Final[Mapping[str, str]] = {}


def plural(noun: str) -> str:
    """More than one of a thing, by the regular rules."""
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    return noun[:-1] + "ies" if noun.endswith("y") and noun[-2] not in "aeiou" else noun + "s"


def articled(text: str) -> str:
    """ "an" before a vowel."""
    return ARTICLE.sub(r"\1n ", text)


WORD_OF: Final[Mapping[str, Callable[[Draw], str]]] = {
    "noun": Draw.noun,
    "nouns": lambda draw: plural(draw.noun()),
    "adj": Draw.adjective,
    "verb": lambda draw: draw.pick(draw.words.verbs),
    "name": lambda draw: draw.pick(draw.words.first_names),
    "job": lambda draw: draw.pick(draw.words.occupations),
    "place": Draw.place,
    "surname": Draw.surname,
    "madeup": Draw.made_up,
    "small": lambda draw: str(draw.between(2, 60)),
    "year": lambda draw: str(draw.between(1700, 2020)),
}


class Pattern:
    """A parsed pattern; each piece is fixed text, a given value, a drawn word, or alternatives."""

    def __init__(self, text: str) -> None:
        """Raises: ValueError for brackets that do not match, KeyError for an unknown `<word>`."""
        tokens = TOKEN.findall(text)
        branches, end = _branches(tokens, 0)
        if end != len(tokens) or len(branches) != 1:
            raise ValueError(f"brackets do not match in {text!r}")
        self._pieces: tuple[Piece, ...] = branches[0]._pieces

    @classmethod
    def _of(cls, pieces: list["Piece"]) -> "Pattern":
        pattern = cls.__new__(cls)
        pattern._pieces = tuple(pieces)
        return pattern

    def expand(self, draw: Draw, values: Mapping[str, str] = NO_VALUES) -> str:
        """One of the sentences that it stands for. Raises: KeyError for a value that is not given."""
        said: list[str] = []
        self._say(draw, values, said)
        return articled("".join(said))

    def count(self) -> int:
        """How many sentences it stands for, words and values aside."""
        total = 1
        for piece in self._pieces:
            if isinstance(piece, tuple):
                total *= sum(branch.count() for branch in piece)
        return total

    def _say(self, draw: Draw, values: Mapping[str, str], said: list[str]) -> None:
        for piece in self._pieces:
            if isinstance(piece, _Value):
                said.append(values[piece])
            elif isinstance(piece, str):
                said.append(piece)
            elif isinstance(piece, tuple):
                draw.pick(piece)._say(draw, values, said)
            else:
                said.append(piece(draw))


class _Value(str):
    """The name of a value that the caller gives."""


Piece = str | Callable[[Draw], str] | tuple[Pattern, ...]


def patterns(text: str) -> tuple[Pattern, ...]:
    """One pattern a line."""
    return tuple(Pattern(line.replace("\\n", "\n")) for line in text.strip().splitlines())


def _branches(tokens: Sequence[str], start: int) -> tuple[list[Pattern], int]:
    """Alternatives from `start` up to the bracket that closes them, or the end."""
    branches: list[Pattern] = []
    pieces: list[Piece] = []
    at = start
    while at < len(tokens) and tokens[at] != "]":
        token = tokens[at]
        if token == "|":
            branches.append(Pattern._of(pieces))
            pieces = []
        elif token == "[":
            inner, at = _branches(tokens, at + 1)
            pieces.append(tuple(inner))
            if at == len(tokens):
                raise ValueError(f"a bracket is never closed in {''.join(tokens)!r}")
        elif token[0] == "{" and len(token) > 2:
            pieces.append(_Value(token[1:-1]))
        elif token[0] == "<" and len(token) > 2:
            pieces.append(WORD_OF[token[1:-1]])
        else:
            pieces.append(token)
        at += 1
    return [*branches, Pattern._of(pieces)], at
