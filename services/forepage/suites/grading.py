"""Is a reply right? One rule for each kind of question; all look only at what makes an answer right.

- default (RULER's `string_match_all`): the share of `expected` that occurs in the reply, ignoring case; a
  number of up to three digits must stand alone;
- qa_1, qa_2 (RULER's `string_match_part`): 1 if any of `expected` occurs. A reply may walk the hops first;
- choice_*: `expected` is one letter; the last "answer is (X)" of the reply names it, or the reply is just it;
- *_count: `expected` is a number; the last number of the reply, in digits or words, must be it;
- *_first: `expected` is (the right one, the other): it stands before "before", or nearer to "first" or
  "earlier" than the other, or the other is not named at all;
- abstention: the reply says that it was never mentioned;
- mrcr_*: `expected` is (code, text). As OpenAI-MRCR: 0 unless the reply starts with the code, else difflib's
  ratio of what follows to the text.
"""

import re
from difflib import SequenceMatcher

from forepage.suites.task import Question

ABSTAINING = re.compile(
    r"\b(?:did(?:n't| not)|never|have(?:n't| not)|has(?:n't| not)|was(?:n't| not)|is(?:n't| not)|not)"
    r"(?: \w+)? (?:mention|mentioned|said|say|told|tell|talked|talk|discussed|discuss|come up|stated|state)\b"
    r"|\bno (?:mention|record|information)\b"
    r"|\b(?:do(?:n't| not)|cannot|can't|could(?:n't| not)) (?:know|find|answer)\b"
    r"|\bnot enough information\b|\bunanswerable\b",
    re.IGNORECASE,
)
CHOICE = re.compile(r"answer(?: is)?:?\s*\(?([A-D])\b\)?", re.IGNORECASE)
ALONE = re.compile(r"\W*([A-D])\W*", re.IGNORECASE)
SHORT_NUMBER = 3
ORDER = re.compile(r"\b(?:first|earlier|before)\b")
NUMBER_WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
]
NUMBER = re.compile(r"\b(?:\d+|" + "|".join(NUMBER_WORDS) + r")\b", re.IGNORECASE)


def grade(question: Question, reply: str) -> float:
    """How right a reply is, 0..1, by the rule of the question's kind."""
    kind = question.kind
    if kind.startswith("choice_"):
        return float(chosen(reply) == question.expected[0])
    if kind.startswith("mrcr_"):
        return _repeated(question.expected[0], question.expected[1], reply)
    if kind.endswith("_count"):
        return float(_last_number(reply) == int(question.expected[0]))
    if kind.endswith("_first"):
        return float(_comes_first(question.expected[0].lower(), question.expected[1].lower(), reply.lower()))
    if kind == "abstention":
        return float(ABSTAINING.search(reply) is not None)
    found = [_occurs(wanted.lower(), reply.lower()) for wanted in question.expected]
    if kind in ("qa_1", "qa_2"):
        return float(any(found))
    return sum(found) / len(found)


def _occurs(wanted: str, reply: str) -> bool:
    """Whether it is in the reply; numbers of up to three digits only as whole numbers."""
    if wanted.isdigit() and len(wanted) <= SHORT_NUMBER:
        return re.search(rf"(?<!\d){wanted}(?!\d)", reply) is not None
    return wanted in reply


def chosen(reply: str) -> str | None:
    """The letter that a reply ends up with, or None."""
    named = CHOICE.findall(reply)
    if named:
        return str(named[-1]).upper()
    alone = ALONE.fullmatch(reply)
    return alone.group(1).upper() if alone else None


def _last_number(reply: str) -> int | None:
    numbers = NUMBER.findall(reply)
    if not numbers:
        return None
    last = numbers[-1].lower()
    return NUMBER_WORDS.index(last) if last in NUMBER_WORDS else int(last)


def _comes_first(right: str, other: str, reply: str) -> bool:
    if other not in reply or right not in reply:
        return right in reply
    if order := list(ORDER.finditer(reply)):
        word = order[-1]
        head = reply[: word.start()]
        if word.group() == "before":
            return head.rfind(right) > head.rfind(other)
        return _distance(right, word.span(), reply) < _distance(other, word.span(), reply)
    return False


def _distance(option: str, word: tuple[int, int], reply: str) -> int:
    """Characters between a word and the nearest mention of an option."""
    starts = [match.start() for match in re.finditer(re.escape(option), reply)]
    return min(max(start - word[1], word[0] - start - len(option)) for start in starts)


def _repeated(code: str, text: str, reply: str) -> float:
    if not reply.startswith(code):
        return 0.0
    return SequenceMatcher(None, reply.removeprefix(code), text, autojunk=True).ratio()
