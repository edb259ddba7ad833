"""LongBench-v2-style questions: four answers to choose from, over one long document of many chapters."""

from dataclasses import replace

from forepage.suites.draw import Draw
from forepage.suites.layout import document_room, inline_task, span
from forepage.suites.pattern import Pattern
from forepage.suites.reading import SHORT, Lookup, documents, lookup
from forepage.suites.task import Question, Task
from forepage.suites.wording import choices as wording
from forepage.suites.world import Statement, World


def longbench(draw: Draw, length_tokens: int, num_questions: int) -> Task:
    """Multiple choice on one or two facts of the document; the wrong answers mostly stand in it too."""
    world = World(draw)
    plain = length_tokens < SHORT
    published = draw.chance(0.2 if draw.training else 0.5)
    wanted = max(1, min(num_questions, length_tokens // (400 if plain else 700)))
    paragraphs: list[list[Statement]] = []
    lookups = [lookup(draw, world, 1 if plain or draw.chance(0.7) else 2, paragraphs) for _ in range(wanted)]
    asking = (
        wording.PUBLISHED_QUESTION if published and not plain else draw.pick(draw.wording(wording.QUESTIONS))
    )
    rivals: list[Statement] = []
    questions = [_question(draw, world, asking, one, rivals) for one in lookups]
    room = document_room(length_tokens, questions)
    intro = wording.PUBLISHED_INTRO if published else draw.pick(draw.wording(wording.INTROS)).expand(draw)
    intro, outro = (intro, wording.PUBLISHED_OUTRO if published else "") if not plain else ("", "")
    head = draw.pick(draw.wording(wording.HEADS))
    text, starts = documents(
        draw, world, paragraphs, room - len(intro) - len(outro), plain=plain,
        head=lambda number: head.expand(draw, {"number": number}),
        rivals=() if plain else draw.shuffled(rivals),
    )  # fmt: skip
    return inline_task(
        "longbench",
        intro + text + outro,
        [
            replace(
                question, evidence=tuple(span(len(intro) + starts[fact], fact.sentence) for fact in one.walk)
            )
            for question, one in zip(questions, lookups, strict=True)
        ],
    )


def _question(draw: Draw, world: World, asking: Pattern, one: Lookup, rivals: list[Statement]) -> Question:
    """The question with its choices; facts about others that make wrong choices plausible go to `rivals`."""
    last = one.walk[-1]
    wrong: dict[str, None] = {}
    while len(wrong) < len(wording.LETTERS) - 1:
        rival = world.statement(last.relation, world.thing(last.relation.subject))
        if rival.object != last.object and rival.object not in wrong:
            wrong[rival.object] = None
            rivals.append(rival)
    options = draw.shuffled([last.object, *wrong])
    letter = wording.LETTERS[options.index(last.object)]
    choices = "\n".join([f"({each}) {option}" for each, option in zip(wording.LETTERS, options, strict=True)])
    text = asking.expand(draw, {"question": one.text, "choices": choices})
    answer = wording.ANSWER.format(facts=" ".join(fact.answer for fact in one.walk), letter=letter)
    return Question(text, answer, (letter,), (), f"choice_{'one' if len(one.walk) == 1 else 'two'}_hop")
