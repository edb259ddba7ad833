"""RULER's two counting tasks: the most common words of a list, and of a coded text.

Several questions on one document are asked of as many lists, each with a number of its own. The evidence is
the whole list.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from forepage.suites.draw import Draw
from forepage.suites.layout import EXAMPLE_FROM, EXAMPLE_TOKENS, document_room, example, inline_task, listed
from forepage.suites.task import Evidence, Question, Task
from forepage.suites.wording import counting as wording

LIST_CHARS = 1600
"""A list of a document with several has at least so many."""

COMMON, UNCOMMON = 30, 3
"""How often RULER repeats a common and another word."""

CODED_LETTERS = 6
TAIL = 400
"""Different coded words in a text, at most."""

MAX_MISSES = 40
"""A list is full when so many words in a row did not fit."""

Fill = Callable[[int, tuple[str, ...]], tuple[str, tuple[str, ...]]]
"""Makes a text of at most so many characters whose most common words are these; also gives their order."""


@dataclass(frozen=True)
class Counting:
    """One document's way of asking: the task's name, how many words, and whether RULER words it."""

    task: str
    count: int
    as_ruler: bool
    lists: int


def common_words(draw: Draw, length_tokens: int, num_questions: int) -> Task:
    """RULER's cwe: ten words that a list repeats often among many that it repeats seldom."""
    lists = _num_lists(length_tokens, num_questions)
    as_ruler = draw.chance(0.2 if draw.training else 0.5)
    small = length_tokens < 3000 * lists
    count = 3 if small else draw.pick((5, 8, 10)) if draw.training else 10
    numbered = as_ruler or draw.chance(0.7)
    return _document(
        draw,
        Counting("cwe", count, as_ruler, lists),
        length_tokens,
        [_distinct(count, lambda: _word(draw)) for _ in range(lists)],
        lambda chars, common: _word_list(draw, chars, common, numbered=numbered),
    )


def frequent_words(draw: Draw, length_tokens: int, num_questions: int) -> Task:
    """RULER's fwe: the three most frequent of coded words whose counts fall off by a power law."""
    lists = _num_lists(length_tokens, num_questions)
    as_ruler = draw.chance(0.2 if draw.training else 0.5)
    alpha = 1.8 + 0.7 * draw.unit() if draw.training else 2.0
    return _document(
        draw,
        Counting("fwe", 3, as_ruler, lists),
        length_tokens,
        [_distinct(3, lambda: _coded(draw)) for _ in range(lists)],
        lambda chars, common: _coded_text(draw, chars, common, alpha),
    )


def _distinct(count: int, make: Callable[[], str]) -> tuple[str, ...]:
    words: dict[str, None] = {}
    while len(words) < count:
        words[make()] = None
    return tuple(words)


def _num_lists(length_tokens: int, num_questions: int) -> int:
    return max(1, min(num_questions, length_tokens // LIST_CHARS))


def _document(
    draw: Draw, counting: Counting, length_tokens: int, commons: Sequence[tuple[str, ...]], fill: Fill
) -> Task:
    kind, lists = counting.task, counting.lists
    intro = (
        wording.RULER_INTRO[kind] if counting.as_ruler else draw.pick(draw.wording(wording.INTROS))
    ).expand(draw) + "\n"
    if counting.as_ruler and kind == "cwe" and length_tokens >= EXAMPLE_FROM and draw.chance(0.5):
        intro = example(common_words(draw, EXAMPLE_TOKENS, 1)) + intro
    questions = []
    for number, common in enumerate(commons, 1):
        name = f"list {number}" if lists > 1 else draw.pick(("the above list", "the list", "the text above"))
        pattern = (
            wording.RULER_QUESTION[kind]
            if counting.as_ruler and lists == 1
            else draw.pick(draw.wording(wording.QUESTIONS))
        )
        said = pattern.expand(draw, {"count": str(counting.count), "list": name})
        questions.append(Question(said, _answer(counting, common), common, (), kind))
    room = document_room(length_tokens, questions) - len(intro) + 1  # the last newline is cut
    parts = [intro]
    at = len(intro)
    placed = []
    for number, question in enumerate(questions, 1):
        head = f"List {number}:\n" if lists > 1 else ""
        words, common = fill(room // (lists - number + 1) - len(head) - 1, question.expected)
        start = at + len(head)
        parts.append(f"{head}{words}\n")
        at += len(parts[-1])
        room -= len(parts[-1])
        evidence = (Evidence(0, start, start + len(words)),)
        answer = _answer(counting, common)
        placed.append(replace(question, answer=answer, expected=common, evidence=evidence))
    return inline_task(f"ruler_{kind}", "".join(parts).rstrip("\n"), placed)


def _answer(counting: Counting, words: tuple[str, ...]) -> str:
    return f"The {counting.count} most common words are {listed(words)}."


def _word_list(
    draw: Draw, chars: int, common: tuple[str, ...], *, numbered: bool
) -> tuple[str, tuple[str, ...]]:
    """A shuffled list in which `common` come most often; also these in order of appearance."""
    items = max(chars // (13 if numbered else 8), len(common) * 4)
    frequency = min(COMMON, max(4, items * 2 // (5 * len(common))))
    repeats = UNCOMMON if frequency >= 20 else 1
    known = set(common)
    sequence = [word for word in common for _ in range(frequency)]
    room = chars + 1 - sum(len(word) + 1 for word in sequence)
    if numbered:
        room -= sum(len(str(at)) + 2 for at in range(1, len(sequence) + 1))
    misses = 0
    while misses < MAX_MISSES and room > 0:
        word = _word(draw) if room > 40 * repeats else draw.made_up(1 + misses % 2)
        times = repeats if room > 40 * repeats else 1
        number = len(str(len(sequence) + times)) + 2 if numbered else 0
        cost = (len(word) + 1 + number) * times
        if word in known or cost > room:
            misses += 1
            continue
        misses = 0
        known.add(word)
        sequence += [word] * times
        room -= cost
    order = draw.shuffled(sequence)
    text = " ".join([f"{at}. {word}" for at, word in enumerate(order, 1)] if numbered else order)
    first = {word: at for at, word in reversed(list(enumerate(order)))}
    return text, tuple(sorted(common, key=first.__getitem__))


def _word(draw: Draw) -> str:
    return draw.noun() if draw.chance(0.3) else draw.made_up()


def _coded(draw: Draw) -> str:
    return draw.letters(CODED_LETTERS).lower()


def _coded_text(draw: Draw, chars: int, common: tuple[str, ...], alpha: float) -> tuple[str, tuple[str, ...]]:
    """Coded words, the k-th as often as k ** -alpha; the first is dots, the next three are `common`."""
    slots = chars // (CODED_LETTERS + 1)
    words = ["....", *common, *(_coded(draw) for _ in range(min(TAIL, slots)))]
    weights = [rank**-alpha for rank in range(1, len(words) + 1)]
    counts = [int(weight * slots / sum(weights)) for weight in weights]
    for rank in (3, 2, 1):  # no ties among those asked for, however short the text
        counts[rank] = max(counts[rank], counts[rank + 1] + 1)
    order = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    room = chars + 1 - sum(len(word) + 1 for word in order)
    order += ["...."] * (room // 5)
    return " ".join(draw.shuffled(order)), common
