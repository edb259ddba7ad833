"""RULER's variable tracking: which variables hold a value, through a chain of assignments."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from forepage.suites.draw import Draw
from forepage.suites.layout import (
    EXAMPLE_FROM,
    EXAMPLE_TOKENS,
    document_room,
    example,
    inline_task,
    listed,
    span,
)
from forepage.suites.prose import Prose, Style, weave
from forepage.suites.task import Question, Task
from forepage.suites.wording import variables as wording

NEEDLE_ROOM = 0.4
"""No more chains are added beyond this share of a length."""

SHORT = 1024
"""Under so many tokens a chain has one hop."""


@dataclass(frozen=True)
class Chain:
    """A value, the variables that come to hold it, and the assignments that say so, in order."""

    value: str
    names: tuple[str, ...]
    lines: tuple[str, ...]


def variable_tracking(draw: Draw, length_tokens: int, num_questions: int) -> Task:
    """One chain of RULER's four hops a question, all in one text; shorter chains where the text is short."""
    as_ruler = draw.chance(0.2 if draw.training else 0.5)
    forms = wording.RULER_ASSIGNMENT if as_ruler else draw.pick(draw.wording(wording.ASSIGNMENTS))
    hops = draw.between(1, 5) if draw.training else 4
    if length_tokens < SHORT:
        hops = 1
    chains = _chains(draw, forms, hops, length_tokens, num_questions, upper=as_ruler or draw.chance(0.6))
    questions = [_question(draw, chain, as_ruler=as_ruler) for chain in chains]
    room = document_room(length_tokens, questions)
    intro = (wording.RULER_INTRO if as_ruler else draw.pick(draw.wording(wording.INTROS))).expand(draw)
    intro = intro if len(intro) < room / 4 else ""
    if as_ruler and length_tokens >= EXAMPLE_FROM and draw.chance(0.5):
        intro = example(variable_tracking(draw, EXAMPLE_TOKENS, 1)) + intro
    lines = _interleaved(draw, chains)
    style = Style.NOISE if as_ruler or draw.chance(0.5) else Style.ESSAY
    woven = weave(draw, Prose(draw, style), lines, room - len(intro))
    start_of = {line: len(intro) + start for line, start in zip(lines, woven.starts, strict=True)}
    return inline_task(
        "ruler_vt",
        intro + woven.text,
        [
            replace(question, evidence=tuple(span(start_of[line], line) for line in chain.lines))
            for question, chain in zip(questions, chains, strict=True)
        ],
    )


def _chains(
    draw: Draw, forms: tuple[str, str], hops: int, length_tokens: int, wanted: int, *, upper: bool
) -> list[Chain]:
    """As many chains as are wanted, or as fit half of the length."""
    taken: set[str] = set()
    chains: list[Chain] = []
    used = 0
    while len(chains) < wanted and (not chains or used < length_tokens * NEEDLE_ROOM):
        chains.append(_chain(draw, forms, hops, taken, upper=upper))
        used += sum(len(line) + 1 for line in chains[-1].lines)
    return chains


def _chain(draw: Draw, forms: tuple[str, str], hops: int, taken: set[str], *, upper: bool) -> Chain:
    value = _fresh(lambda: draw.digits(5), taken)
    names = [_fresh(lambda: draw.letters(5) if upper else draw.made_up(), taken) for _ in range(hops + 1)]
    lines = [
        forms[min(hop, 1)].format(name=name, value=before)
        for hop, (name, before) in enumerate(zip(names, [value, *names], strict=False))
    ]
    return Chain(value, tuple(names), tuple(lines))


def _fresh(make: Callable[[], str], taken: set[str]) -> str:
    while (name := make()) in taken:
        pass
    taken.add(name)
    return name


def _interleaved(draw: Draw, chains: list[Chain]) -> list[str]:
    """All assignments, each chain's in their order, mixed with the others'."""
    rest = [iter(chain.lines) for chain in chains]
    return [
        next(rest[owner]) for owner in draw.shuffled([at for at, it in enumerate(chains) for _ in it.lines])
    ]


def _question(draw: Draw, chain: Chain, *, as_ruler: bool) -> Question:
    """The answer walks the chain, then lists the variables."""
    pattern = wording.RULER_QUESTION if as_ruler else draw.pick(draw.wording(wording.QUESTIONS))
    walk = [f"{name} = {held}" for name, held in zip(chain.names, [chain.value, *chain.names], strict=False)]
    answer = f"{', '.join(walk)}. The variables are {listed(chain.names)}."
    return Question(pattern.expand(draw, {"value": chain.value}), answer, chain.names, (), "vt")
