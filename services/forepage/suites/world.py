"""A made-up world for one document: things with unique names, and one object for each relation of a thing."""

from collections.abc import Callable
from dataclasses import dataclass

from forepage.suites.draw import Draw
from forepage.suites.pattern import articled, plural
from forepage.suites.wording.relations import RELATIONS, Relation

RELATIONS_OF = {
    sort: tuple(relation for relation in RELATIONS.values() if relation.subject == sort)
    for sort in ("person", "place", "company", "book")
}


@dataclass(frozen=True)
class Statement:
    """One fact of the world: about whom, what, and the sentence that says it."""

    relation: Relation
    subject: str
    object: str
    sentence: str

    @property
    def answer(self) -> str:
        """The fact as a good reply states it."""
        return articled(_capital(self.relation.answer.format(s=self.subject, o=self.object)))


class World:
    """Makes things and facts; a name is given to one thing only."""

    def __init__(self, draw: Draw) -> None:
        self._draw = draw
        self._taken: set[str] = set()
        self._make: dict[str, Callable[[], str]] = {
            "person": draw.person,
            "place": draw.place,
            "country": lambda: draw.made_up(3).capitalize(),
            "company": lambda: (
                f"{draw.surname()} {draw.pick(('Works', 'Brothers', 'Trading', 'Mills', 'Group'))}"
            ),
            "book": lambda: (
                f"The {draw.adjective().capitalize()} {draw.noun().capitalize()} of {draw.place()}"
            ),
            "madeup": lambda: draw.made_up(2).capitalize(),
        }

    def thing(self, sort: str) -> str:
        """A new thing of a sort; years, jobs and goods may come again."""
        draw = self._draw
        if sort == "year":
            return str(draw.between(1650, 2020))
        if sort == "job":
            return draw.pick(draw.words.occupations)
        if sort == "nouns":
            return f"{draw.adjective()} {plural(draw.noun())}"
        while (name := self._make[sort]()) in self._taken:
            pass
        self._taken.add(name)
        return name

    def statement(self, relation: Relation, subject: str, thing: str | None = None) -> Statement:
        """A fact about `subject`; its object is new unless it is given."""
        what = thing if thing is not None else self.thing(relation.object)
        said = self._draw.wording(relation.stated).expand(self._draw, {"s": subject, "o": what})
        return Statement(relation, subject, what, _capital(said) + ".")

    def question(self, statement: Statement) -> str:
        """A question whose answer is the fact."""
        return self._draw.wording(statement.relation.asked).expand(self._draw, {"s": statement.subject})

    def facts(self, sort: str, count: int) -> list[Statement]:
        """A new thing, with `count` different facts about it."""
        name = self.thing(sort)
        return [self.statement(relation, name) for relation in self._draw.some(RELATIONS_OF[sort], count)]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
