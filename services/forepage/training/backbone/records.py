"""The first task: records with near-duplicate keys to look up, and spans to copy, in noise words.

The first half of a document is slots, each holding a record (mark, key, separator, value, end) at a random
place among made-up words. The second half asks for records again, copies spans of the first half, or goes
on with noise. What can be predicted, and counts, is a value once its key is given, and a copied span after
its first symbols. Half of the keys differ from another key in one symbol. Alphabets and marks vary, so that
neither is learned by heart.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from forepage.training.backbone.documents import NO_QUESTION, REST, Document

WIDTHS, WIDTH_SHARES = (32, 64, 96), (0.6, 0.25, 0.15)
"""Tokens of a slot; a document has one width. Wider ones hold longer values."""
MIN_KEY, MAX_KEY = 3, 8
FEW, MIN_KEY_OF_MANY = 32, 5
"""Of more records than that, keys are longer, or too many would be the same by chance."""
MIN_VALUE = 3
SIGNS = 3
"""Symbols of a record that are neither key nor value."""
UNSURE = 3
"""Symbols of a copied span that can't be known yet."""
ASKED, COPIED = 0.5, 0.35
LEXICON = 96
PLACEHOLDERS = range(265, 320)
PUNCTUATION = tuple(b"[]<>{}()=:;|#@~^*&%$!?/\n")
CONSONANTS, VOWELS = b"bcdfghjklmnpqrstvwz", b"aeiou"
ALPHABETS = (
    bytes(range(97, 123)),
    b"0123456789",
    b"0123456789abcdef",
    bytes(range(65, 91)) + b"0123456789",
    bytes(range(33, 127)),
    bytes(range(256)),
)
Tokens = NDArray[np.uint16]


def record_document(draw: np.random.Generator, length: int, kind: int) -> Document:
    """A document of exactly `length` tokens, a multiple of 192; its answers are of this kind."""
    width = int(draw.choice(WIDTHS, p=WIDTH_SHARES)) if length >= 8 * max(WIDTHS) else min(WIDTHS)
    slots = length // width
    stored = slots // 2
    tokens = _noise(draw, length)
    kinds = np.full(length, REST, np.uint8)
    questions = np.full(length, NO_QUESTION, np.int32)
    decisive = np.zeros(length, np.bool_)
    table = _Records(draw, stored, width)
    for slot in range(stored):
        table.write(tokens, slot * width, slot)
    uses = draw.random(slots)
    for slot in range(stored, slots):
        start = slot * width
        if uses[slot] < ASKED:
            answer = table.write(tokens, start, int(draw.integers(stored)))
        elif uses[slot] < ASKED + COPIED:
            source = int(draw.integers(stored * width - width))
            tokens[start : start + width] = tokens[source : source + width]
            answer = slice(start + UNSURE, start + width)
        else:
            continue
        kinds[answer] = kind
        questions[answer] = slot
        decisive[answer.start : answer.start + MIN_VALUE] = True
    return Document(tokens, kinds, questions, decisive)


class _Records:
    """The records of one document."""

    def __init__(self, draw: np.random.Generator, count: int, width: int) -> None:
        alphabet = np.frombuffer(ALPHABETS[int(draw.integers(len(ALPHABETS)))], np.uint8).astype(np.uint16)
        keys = alphabet[draw.integers(len(alphabet), size=(count, MAX_KEY))]
        shortest = MIN_KEY if count <= FEW else MIN_KEY_OF_MANY
        lengths = draw.integers(shortest, MAX_KEY + 1, size=count)
        near = draw.permutation(count)[: count // 2]
        twins = draw.integers(count, size=len(near))
        keys[near], lengths[near] = keys[twins], lengths[twins]
        keys[near, draw.integers(lengths[near])] = alphabet[draw.integers(len(alphabet), size=len(near))]
        _tell_apart(draw, keys, lengths, alphabet)
        longest = width - SIGNS - MAX_KEY - 5
        self._values = alphabet[draw.integers(len(alphabet), size=(count, longest))]
        self._value_lengths = draw.integers(MIN_VALUE, longest + 1, size=count)
        self._keys, self._key_lengths = keys, lengths
        self._signs = _signs(draw)
        self._width = width
        self._draw = draw

    def write(self, tokens: Tokens, start: int, record: int) -> slice:
        """Put a record at a random place of the slot that begins at `start`; where its value and end are."""
        key = self._keys[record, : self._key_lengths[record]]
        value = self._values[record, : self._value_lengths[record]]
        size = SIGNS + len(key) + len(value)
        at = start + int(self._draw.integers(self._width - size + 1))
        mark, separator, end = self._signs
        tokens[at] = mark
        tokens[at + 1 : at + 1 + len(key)] = key
        tokens[at + 1 + len(key)] = separator
        tokens[at + 2 + len(key) : at + size - 1] = value
        tokens[at + size - 1] = end
        return slice(at + 2 + len(key), at + size)


def _tell_apart(
    draw: np.random.Generator, keys: Tokens, lengths: NDArray[np.int64], alphabet: Tokens
) -> None:
    """Change a symbol of each key that is another's too, in place: a key says which value is asked for."""
    given: set[bytes] = set()
    for key, length in zip(keys, lengths, strict=True):
        while key[:length].tobytes() in given:
            key[draw.integers(length)] = alphabet[draw.integers(len(alphabet))]
        given.add(key[:length].tobytes())


def _signs(draw: np.random.Generator) -> Sequence[int]:
    """Mark, separator and end of a document's records."""
    signs = PLACEHOLDERS if draw.random() < 0.5 else PUNCTUATION
    return [signs[place] for place in draw.permutation(len(signs))[:SIGNS]]


def _noise(draw: np.random.Generator, length: int) -> Tokens:
    """Words of a fresh lexicon, with spaces."""
    syllables = [bytes((c, v)) for c in CONSONANTS for v in VOWELS]
    words = []
    for count in draw.integers(1, 4, size=LEXICON):
        words.append(b"".join(syllables[place] for place in draw.integers(len(syllables), size=count)) + b" ")
    text = b"".join([words[place] for place in draw.integers(LEXICON, size=length // 3 + 1)])
    return np.frombuffer(text[:length], np.uint8).astype(np.uint16)
