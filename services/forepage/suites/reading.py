"""RULER's two reading tasks on a made-up world: a fact of one document (qa_1), or of two in turn (qa_2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from forepage.suites.draw import Draw
from forepage.suites.layout import document_room, inline_task, span
from forepage.suites.pattern import Pattern
from forepage.suites.prose import MIN_PAD, Prose, Style
from forepage.suites.task import Question, Task
from forepage.suites.wording import reading as wording
from forepage.suites.wording.relations import RELATIONS
from forepage.suites.world import Statement, World

SHORT = 1500
"""Under so many tokens paragraphs hold nothing but facts."""

NUMBER = "\0"
"""Where a heading has its document's number."""

MIN_BODY = 60
"""No document is shorter; a smaller rest is filler behind the last one."""

SORTS = ("person", "person", "place", "company", "book")
"""What documents that are beside the point tell about."""

HEAD_CHARS = 34
"""A document's heading has about so many characters, at most."""

SORTS = ("person", "person", "place", "company", "book")
"""What documents that are beside the point tell about."""


@dataclass(frozen=True)
class Lookup:
    """A question with the facts that lead to its answer, in the order of the walk."""

    text: str
    walk: tuple[Statement, ...]


@dataclass(frozen=True)
class Body:
    """One document: its heading with a place for its number, its sentences, and the facts among them."""

    head: str
    sentences: tuple[str, ...]
    facts: tuple[Statement, ...]

    def chars(self, number: int) -> int:
        """Its length, line ends included, as the `number`-th; the sum over all is the same in any order."""
        return len(self.head) - 1 + len(str(number)) + 1 + sum(map(len, self.sentences)) + len(self.sentences)

    def facts_at(self) -> list[Statement | None]:
        """For each sentence the fact that it states, if it states one."""
        known = {fact.sentence: fact for fact in self.facts}
        return [known.get(sentence) for sentence in self.sentences]


def reading(draw: Draw, suite: str, length_tokens: int, num_questions: int) -> Task:
    """qa_1 or qa_2 over numbered documents of which most are beside the point."""
    world = World(draw)
    as_ruler = draw.chance(0.2 if draw.training else 0.5)
    frame = (
        wording.RULER_QUESTION
        if as_ruler and length_tokens >= SHORT
        else draw.pick(draw.wording(wording.FRAMES))
    )
    hops = 1 if suite == "qa_1" else 2
    chars = (260 if length_tokens < SHORT else 450) * hops
    wanted = max(1, min(num_questions, length_tokens // chars))
    paragraphs: list[list[Statement]] = []
    lookups = [lookup(draw, world, hops, paragraphs) for _ in range(wanted)]
    questions = [_question(draw, suite, frame, one) for one in lookups]
    room = document_room(length_tokens, questions)
    intro = (wording.RULER_INTRO if as_ruler else draw.pick(draw.wording(wording.INTROS))).expand(draw)
    intro = intro if len(intro) < room / 4 else ""
    text, starts = documents(draw, world, paragraphs, room - len(intro), plain=length_tokens < SHORT)
    return inline_task(
        f"ruler_{suite}",
        intro + text,
        [
            replace(
                question,
                evidence=tuple(span(len(intro) + starts[fact], fact.sentence) for fact in one.walk),
            )
            for question, one in zip(questions, lookups, strict=True)
        ],
    )


def lookup(draw: Draw, world: World, hops: int, paragraphs: list[list[Statement]]) -> Lookup:
    """A question on new things; the paragraphs that tell about them are added."""
    if hops == 1:
        facts = world.facts(draw.pick(("person", "place", "company", "book")), 2)
        paragraphs.append(facts)
        return Lookup(world.question(facts[0]), (facts[0],))
    first_name, second_name, asked, asked_test, sort = draw.pick(wording.HOPS)
    first, second = RELATIONS[first_name], RELATIONS[second_name]
    start = world.statement(first, world.thing(sort))
    end = world.statement(second, start.object)
    paragraphs.append(draw.shuffled([start, *_aside(draw, world, start)]))
    paragraphs.append(draw.shuffled([end, *_aside(draw, world, end)]))
    text = Pattern(asked_test if draw.says_as_test() else asked).expand(draw, {"s": start.subject})
    return Lookup(text, (start, end))


def _aside(draw: Draw, world: World, fact: Statement) -> list[Statement]:
    """Sometimes another fact about the same thing."""
    others = [
        one for one in RELATIONS.values() if one.subject == fact.relation.subject and one != fact.relation
    ]
    return [world.statement(draw.pick(others), fact.subject)] if draw.chance(0.5) else []


def _question(draw: Draw, suite: str, frame: Pattern, one: Lookup) -> Question:
    answer = " ".join(fact.answer for fact in one.walk)
    text = frame.expand(draw, {"question": one.text})
    return Question(text, answer, (one.walk[-1].object,), (), suite)


def documents(
    draw: Draw,
    world: World,
    paragraphs: list[list[Statement]],
    chars: int,
    *,
    plain: bool,
    head: Callable[[str], str] = "Document {}:".format,
    rivals: Sequence[Statement] = (),
) -> tuple[str, dict[Statement, int]]:
    """Numbered documents in random order, filled up with `rivals` and others; where each fact begins."""
    prose = Prose(draw, Style.ESSAY)
    bodies = [Body(head(NUMBER), *_body(draw, prose, facts, plain=plain)) for facts in paragraphs]
    room = chars + 1 - sum(body.chars(number) for number, body in enumerate(bodies, 1))
    waiting = iter(rivals)
    while room > MIN_BODY:
        rival = next(waiting, None)
        aside = [rival] if rival is not None else world.facts(draw.pick(SORTS), draw.between(1, 3))
        body = Body(head(NUMBER), *_body(draw, prose, aside, plain=plain))
        if body.chars(len(bodies) + 1) > room:
            empty = Body(body.head, ("",), ()).chars(len(bodies) + 1)
            body = Body(body.head, (prose.some(room - empty),), ())
        bodies.append(body)
        room -= body.chars(len(bodies))
    starts: dict[Statement, int] = {}
    parts: list[str] = []
    at = 0
    for number, body in enumerate(draw.shuffled(bodies), 1):
        parts.append(body.head.replace(NUMBER, str(number)) + "\n")
        at += len(parts[-1])
        for sentence, fact in zip(body.sentences, body.facts_at(), strict=True):
            if fact is not None:
                starts[fact] = at
            at += len(sentence) + 1
        parts.append(" ".join(body.sentences) + "\n")
    text = "".join(parts).rstrip()
    return text + (" " + prose.some(room - 1) if room > MIN_PAD else ""), starts


def _body(
    draw: Draw, prose: Prose, facts: list[Statement], *, plain: bool
) -> tuple[tuple[str, ...], tuple[Statement, ...]]:
    """The sentences of one document, facts among filler."""
    filler = [] if plain else [prose.sentence() for _ in range(draw.between(0, 3))]
    return tuple(draw.shuffled([fact.sentence for fact in facts] + filler)), tuple(facts)
