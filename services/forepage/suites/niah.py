"""RULER's eight needle tasks: find one or more values by key in noise, prose or a haystack of needles.

Several questions on one document mean as many needles, each with a key of its own. Keys that nobody asks for
are often one letter away from one that is asked for.
"""

from dataclasses import dataclass, replace

from forepage.suites.draw import Draw
from forepage.suites.keys import Keys
from forepage.suites.layout import document_room, inline_task, listed, span
from forepage.suites.pattern import Pattern
from forepage.suites.prose import Prose, Style, weave
from forepage.suites.task import Question, Task
from forepage.suites.wording import needles as wording

RULER_SHARE = {True: 0.2, False: 0.5}
"""How many documents are worded as RULER words them, in training and in the test."""

NEEDLE_ROOM = 0.6
"""Most of a length that asked needles take: no more questions are added beyond it."""

MAX_SHARE = 0.9
"""Most of a document's characters that asked needles may take."""


@dataclass(frozen=True)
class Recipe:
    """One task type: what is looked up by what, in what, and how much at once."""

    haystack: Style | None  # None: made of needles
    key: str
    value: str
    distractors: int = 0
    values_per_key: int = 1
    keys_per_question: int = 1


RECIPES = {
    "niah_single_1": Recipe(Style.NOISE, "word", "number"),
    "niah_single_2": Recipe(Style.ESSAY, "word", "number"),
    "niah_single_3": Recipe(Style.ESSAY, "word", "uuid"),
    "niah_multikey_1": Recipe(Style.ESSAY, "word", "number", distractors=3),
    "niah_multikey_2": Recipe(None, "word", "number"),
    "niah_multikey_3": Recipe(None, "uuid", "uuid"),
    "niah_multivalue": Recipe(Style.ESSAY, "word", "number", values_per_key=4),
    "niah_multiquery": Recipe(Style.ESSAY, "word", "number", keys_per_question=4),
}


@dataclass(frozen=True)
class Wording:
    """How one document says its needles and asks for them."""

    kind: str
    attribute: str
    needle: tuple[Pattern, ...]
    intro: Pattern
    question: tuple[Pattern, ...]


@dataclass(frozen=True)
class Fact:
    """A needle: its key, its value and its sentence."""

    key: str
    value: str
    sentence: str


def niah(draw: Draw, suite: str, length_tokens: int, num_questions: int) -> Task:
    """A needle task of RULER's type `suite`; fewer questions where there is no room for their needles."""
    wanted = num_questions
    while True:
        recipe = _varied(draw, RECIPES[suite], length_tokens)
        task = _attempt(draw, suite, recipe, length_tokens, wanted)
        if task is not None:
            return task
        wanted = max(1, wanted * 2 // 3)


def _attempt(draw: Draw, suite: str, recipe: Recipe, length_tokens: int, num_questions: int) -> Task | None:
    """A task, or None where its needles turn out too long for the room."""
    worded = _wording(draw, recipe)
    keys = Keys(draw, recipe.key)
    groups: list[list[Fact]] = []
    used = 0
    while len(groups) < num_questions and used < length_tokens * NEEDLE_ROOM:
        groups.append(_facts(draw, recipe, worded, keys, recipe.keys_per_question))
        used += sum(len(fact.sentence) + 1 for fact in groups[-1])
    facts = [fact for group in groups for fact in group]
    order = draw.shuffled(facts)
    questions = [_question(draw, suite, worded, group) for group in groups]
    room = document_room(length_tokens, questions)
    if used > room * MAX_SHARE:
        return None
    intro = worded.intro.expand(draw, {"attribute": worded.attribute, "kind": worded.kind}) + "\n"
    intro = intro if len(intro) < min(room / 4, room - used) else ""
    room -= len(intro)
    placed = _spread(draw, order, _distractors(draw, recipe, worded, keys, room - used))
    prose = Prose(draw, _style(draw, recipe.haystack))
    woven = weave(draw, prose, [fact.sentence for fact in placed], room)
    start_of = {fact: len(intro) + start for fact, start in zip(placed, woven.starts, strict=True)}
    return inline_task(
        f"ruler_{suite}",
        intro + woven.text,
        [
            replace(question, evidence=tuple(span(start_of[fact], fact.sentence) for fact in group))
            for question, group in zip(questions, groups, strict=True)
        ],
    )


def _spread(draw: Draw, order: list[Fact], others: list[Fact]) -> list[Fact]:
    """The facts in their order, with others at random places between."""
    turns = draw.shuffled([True] * len(order) + [False] * len(others))
    mine, theirs = iter(order), iter(others)
    return [next(mine) if turn else next(theirs) for turn in turns]


def _varied(draw: Draw, recipe: Recipe, length_tokens: int) -> Recipe:
    """In training other kinds of keys and values too; fewer values at once where the text is very short."""
    if draw.training and draw.chance(0.4):
        value = draw.pick(("number", "word", "uuid", "code"))
        key = draw.pick(("word", "word", "name", "made_up", "code", "uuid"))
        small = length_tokens < 1024
        recipe = replace(
            recipe, key="word" if small and key == "uuid" else key, value="number" if small else value
        )
    if draw.training and recipe.haystack is not None and draw.chance(0.3):
        recipe = replace(recipe, distractors=recipe.distractors + draw.between(1, 8))
    if length_tokens < 1024:
        recipe = replace(
            recipe,
            values_per_key=min(2, recipe.values_per_key),
            keys_per_question=min(2, recipe.keys_per_question),
        )
    return recipe


def _wording(draw: Draw, recipe: Recipe) -> Wording:
    many = recipe.values_per_key > 1 or recipe.keys_per_question > 1
    if draw.chance(RULER_SHARE[draw.training]) and recipe.value != "code":
        return Wording(
            recipe.value,
            f"special magic {recipe.value}",
            (wording.RULER_NEEDLE,),
            wording.RULER_INTRO[many],
            (wording.RULER_QUESTION[many],),
        )
    asking = wording.QUESTIONS
    if many:
        asking = wording.MANY_QUESTIONS if recipe.values_per_key > 1 else wording.MULTI_QUESTIONS
    needles = draw.wording(wording.NEEDLES)
    mixed = draw.chance(0.3)
    return Wording(
        recipe.value,
        _attribute(draw, recipe.value),
        needles if mixed else (draw.pick(needles),),
        draw.pick(draw.wording(wording.INTROS)),
        draw.wording(asking),
    )


def _style(draw: Draw, haystack: Style | None) -> Style:
    if haystack is Style.NOISE:
        return Style.NOISE
    if not draw.training:
        return Style.ESSAY
    return draw.pick((Style.ESSAY, Style.ESSAY, Style.NOTES, Style.TALK, Style.MIXED, Style.MIXED))


def _facts(draw: Draw, recipe: Recipe, worded: Wording, keys: Keys, num_keys: int) -> list[Fact]:
    """The needles of so many new keys."""
    return [
        _fact(draw, recipe, worded, key)
        for key in [keys.new() for _ in range(num_keys)]
        for _ in range(recipe.values_per_key)
    ]


def _fact(draw: Draw, recipe: Recipe, worded: Wording, key: str) -> Fact:
    value = value_of(draw, recipe.value)
    said = draw.pick(worded.needle).expand(
        draw, {"attribute": worded.attribute, "kind": worded.kind, "key": key, "value": value}
    )
    return Fact(key, value, said)


def value_of(draw: Draw, kind: str) -> str:
    """A value of a kind: RULER's 7 digits in the test, other lengths too in training."""
    if kind == "number":
        return draw.digits(7 if not draw.training or draw.chance(0.5) else draw.between(4, 10))
    if kind == "word":
        return f"{draw.adjective()}-{draw.noun()}" if draw.chance(0.5) else draw.made_up(3)
    if kind == "code":
        return f"{draw.letters(draw.between(2, 3))}-{draw.digits(4)}{draw.pick(('', draw.letters(2)))}"
    return draw.uuid()


def _distractors(draw: Draw, recipe: Recipe, worded: Wording, keys: Keys, room: int) -> list[Fact]:
    """Needles that nobody asks for: as many as the recipe has, or as the room holds."""
    single = replace(recipe, values_per_key=1)
    others: list[Fact] = []
    while recipe.haystack is None or len(others) < recipe.distractors:
        fact = _other(draw, single, worded, keys)
        room -= len(fact.sentence) + 1
        if room < 0:
            break
        others.append(fact)
    return others


def _other(draw: Draw, recipe: Recipe, worded: Wording, keys: Keys) -> Fact:
    """A needle that nobody asks for; in training sometimes another thing about a key that is asked for."""
    if draw.training and draw.chance(0.15) and (given := keys.given()):
        attribute = _attribute(draw, recipe.value)
        if attribute != worded.attribute:
            return _fact(
                draw, recipe, replace(worded, attribute=attribute, needle=wording.OWN_NEEDLES), given
            )
    return _fact(draw, recipe, worded, keys.near() if draw.chance(0.5) else keys.new())


def _attribute(draw: Draw, kind: str) -> str:
    """What a value is called; in training often something that no list has."""
    if draw.training and draw.chance(0.3):
        word = draw.noun() if draw.chance(0.7) else draw.adjective()
        return f"{word} {draw.pick(wording.KINDS[kind])}"
    return draw.pick(wording.ATTRIBUTES[draw.split.value][kind])


def _question(draw: Draw, suite: str, worded: Wording, group: list[Fact]) -> Question:
    """Ask for a group; several values of one key are answered in ascending order."""
    names = tuple(dict.fromkeys(fact.key for fact in group))
    said = draw.pick(worded.question).expand(
        draw, {"attribute": worded.attribute, "kind": worded.kind, "key": listed(names)}
    )
    if len(names) == 1 and len(group) > 1:
        group = sorted(group, key=lambda fact: fact.value)
    values = tuple(fact.value for fact in group)
    return Question(said, _answer(worded.attribute, names, values), values, (), suite)


def _answer(attribute: str, names: tuple[str, ...], values: tuple[str, ...]) -> str:
    if len(values) == 1:
        return f"The {attribute} for {names[0]} is {values[0]}."
    if len(names) == 1:
        return f"The {attribute}s for {names[0]} are {listed(values)}."
    first, *rest = [f"for {name} {{}} {value}" for name, value in zip(names, values, strict=True)]
    return f"The {attribute} {first.format('is')}, {listed([each.format('it is') for each in rest])}."
