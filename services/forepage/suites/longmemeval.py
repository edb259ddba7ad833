"""LongMemEval-style questions over many dated sessions: one or more sessions, updates, time, abstention."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta

from forepage.suites.draw import Draw
from forepage.suites.layout import SEPARATOR, document_room, listed
from forepage.suites.pattern import Pattern, plural
from forepage.suites.prose import Prose, Style
from forepage.suites.sessions import Exchange, Layout, Saying, Session, dated, exchange_of, fill, stamp
from forepage.suites.task import Question, Task
from forepage.suites.wording import memory as wording
from forepage.suites.wording.memory import Topic

SESSION_CHARS = 1800
"""A session has about so many, more where the text is long."""

SHORT = 1500
"""Under so many tokens remarks stand alone, and only kinds with few remarks are asked."""

REMARK_SHARE = 0.5
"""Most of the text that remarks which matter take."""

REMARK_CHARS = 90
"""About what surrounds a remark: its reply and a sentence of small talk."""


@dataclass(frozen=True)
class Asked:
    """A question with the sayings it rests on; `with_dates` where their dates are evidence too."""

    question: Question
    sayings: tuple[Saying, ...]
    with_dates: bool = False


class Memories:
    """Makes what was said and what is asked, over sessions that exist; a thing is talked about once."""

    def __init__(self, draw: Draw, sessions: list[Session]) -> None:
        self._draw = draw
        self._sessions = sessions
        self._taken: set[str] = set()
        self.makers: dict[str, tuple[int, Callable[[], Asked]]] = {
            "single_session_user": (1, lambda: self._single(wording.USER_FACTS, "single_session_user")),
            "single_session_assistant": (
                1,
                lambda: self._single(wording.ASSISTANT_FACTS, "single_session_assistant"),
            ),
            "preference": (1, lambda: self._single(wording.PREFERENCES, "preference")),
            "multi_session_list": (4, lambda: self._collection(counted=False)),
            "multi_session_count": (4, lambda: self._collection(counted=True)),
            "knowledge_update": (2, self._update),
            "temporal_when": (1, self._when),
            "temporal_first": (2, self._first),
            "temporal_days_count": (2, self._days),
            "abstention": (0, self._abstention),
        }

    def _thing(self) -> str:
        draw = self._draw
        while True:
            noun = draw.noun() if draw.chance(0.8) else draw.made_up()
            thing = f"{draw.adjective()} {noun}"
            if thing not in self._taken:
                self._taken.add(thing)
                return thing

    def _object(self, sort: str) -> str:
        draw = self._draw
        makers: dict[str, Callable[[], str]] = {
            "shop": lambda: f"{draw.surname()} {draw.pick(('Market', 'Store', 'Outlet', 'Bazaar'))}",
            "price": lambda: str(draw.between(12, 980)),
            "name": lambda: draw.pick(draw.words.first_names),
            "madeup": lambda: draw.made_up().capitalize(),
            "place": draw.place,
            "degrees": lambda: str(draw.between(40, 260)),
            "small": lambda: str(draw.between(3, 90)),
            "things": self._thing,
            "digits": lambda: draw.digits(draw.between(4, 6)),
            "none": str,
        }
        return makers[sort]()

    def _say(self, topic: Topic, thing: str, what: str, session: int) -> Saying:
        values = {"s": thing, "o": what}
        said = self._draw.wording(topic.said).expand(self._draw, values)
        request = topic.request.expand(self._draw, values) if topic.request else ""
        return Saying(said[0].upper() + said[1:], session, request)

    def _ask(self, topic: Topic, thing: str) -> str:
        return self._draw.wording(topic.asked).expand(self._draw, {"s": thing})

    def _anywhere(self) -> int:
        return self._draw.below(len(self._sessions))

    def _several(self, count: int) -> list[int]:
        return sorted(self._draw.some(range(len(self._sessions)), count))

    def _single(self, topics: tuple[Topic, ...], kind: str) -> Asked:
        topic, thing = self._draw.pick(topics), self._thing()
        if kind == "preference":
            head, noun = thing.split(" ", 1)
            thing = f"{head} {plural(noun)}"
        what = self._object(topic.object)
        saying = self._say(topic, thing, what, self._anywhere())
        answer = topic.answer.format(s=thing, o=what)
        return Asked(Question(self._ask(topic, thing), answer, (what,), (), kind), (saying,))

    def _collection(self, *, counted: bool) -> Asked:
        draw = self._draw
        topic, thing = draw.pick(wording.COLLECTIONS), self._thing()
        places = self._several(draw.between(2, 5 if draw.training else 4))
        items: dict[str, None] = {}
        while len(items) < len(places):
            items[self._object(topic.object)] = None
        sayings = [self._say(topic, thing, what, at) for what, at in zip(items, places, strict=True)]
        answer = topic.answer.format(s=thing, o=listed(tuple(items)))
        if not counted:
            question = Question(self._ask(topic, thing), answer, tuple(items), (), "multi_session_list")
            return Asked(question, tuple(sayings))
        asking = Pattern(wording.COUNT_QUESTIONS[topic.name][draw.says_as_test()]).expand(draw, {"s": thing})
        answer = f"{answer} That makes {len(items)}."
        return Asked(Question(asking, answer, (str(len(items)),), (), "multi_session_count"), tuple(sayings))

    def _update(self) -> Asked:
        topic, thing = self._draw.pick(wording.UPDATES), self._thing()
        values: dict[str, None] = {}
        while len(values) < 2:
            values[self._object(topic.object)] = None
        places = self._several(2)
        sayings = [self._say(topic, thing, what, at) for what, at in zip(values, places, strict=True)]
        latest = list(values)[-1]
        answer = topic.answer.format(s=thing, o=latest)
        return Asked(
            Question(self._ask(topic, thing), answer, (latest,), (), "knowledge_update"), tuple(sayings)
        )

    def _event(self, session: int) -> tuple[Topic, str, Saying]:
        topic, thing = self._draw.pick(wording.EVENTS), self._thing()
        return topic, thing, self._say(topic, thing, "", session)

    def _when(self) -> Asked:
        at = self._anywhere()
        topic, thing, saying = self._event(at)
        day = self._sessions[at].day
        answer = topic.answer.format(s=thing, o=day)
        question = Question(self._ask(topic, thing), answer, (day,), (), "temporal_when")
        return Asked(question, (saying,), with_dates=True)

    def _first(self) -> Asked:
        early, late, days, sayings = self._two_events(len(self._sessions))
        a, b = (early, late) if self._draw.chance(0.5) else (late, early)
        asking = self._draw.pick(self._draw.wording(wording.FIRST_QUESTIONS)).expand(
            self._draw, {"a": a, "b": b}
        )
        answer = f"The {early} was on {days[0]} and the {late} was on {days[1]}, so the {early} came first."
        return Asked(Question(asking, answer, (early, late), (), "temporal_first"), sayings, with_dates=True)

    def _days(self) -> Asked:
        early, late, days, sayings = self._two_events(8)
        first, second = (self._sessions[saying.session].date.date() for saying in sayings)
        asking = self._draw.pick(self._draw.wording(wording.DAYS_QUESTIONS)).expand(
            self._draw, {"a": early, "b": late}
        )
        passed = (second - first).days
        answer = (
            f"The {early} was on {days[0]} and the {late} was on {days[1]}, so the days between are {passed}."
        )
        return Asked(
            Question(asking, answer, (str(passed),), (), "temporal_days_count"), sayings, with_dates=True
        )

    def _two_events(self, reach: int) -> tuple[str, str, tuple[str, str], tuple[Saying, Saying]]:
        """Two events in two sessions at most `reach` apart, the earlier first."""
        first = self._draw.below(len(self._sessions) - 1)
        last = min(len(self._sessions) - 1, first + reach)
        second = self._draw.between(first + 1, last)
        _, early, one = self._event(first)
        _, late, two = self._event(second)
        return early, late, (self._sessions[first].day, self._sessions[second].day), (one, two)

    def _abstention(self) -> Asked:
        known = sorted(self._taken)
        thing = self._thing()
        if known and self._draw.chance(0.5):  # the same sort of thing, but another one
            thing = f"{thing.split(' ', 1)[0]} {self._draw.pick(known).split(' ', 1)[1]}"
            thing = self._thing() if thing in self._taken else thing
        topics = wording.USER_FACTS + wording.ASSISTANT_FACTS + wording.UPDATES + wording.EVENTS
        asking = self._ask(self._draw.pick(topics), thing)
        return Asked(Question(asking, wording.ABSTAINING, (wording.ABSTAINING,), (), "abstention"), ())


def longmemeval(draw: Draw, length_tokens: int, num_questions: int) -> Task:
    """Sessions full of small talk, and questions on what was said in them."""
    layout = Layout(draw.chance(0.3 if draw.training else 0.5), "")
    layout = replace(layout, intro=draw.pick(draw.wording(wording.INTROS)) if length_tokens >= SHORT else "")
    plain = length_tokens < SHORT
    sessions = dated(draw, max(2, min(length_tokens // SESSION_CHARS, 60 + length_tokens // 6000)))
    asked = _asked(draw, sessions, length_tokens, num_questions)
    today = stamp(sessions[-1].date + timedelta(days=draw.between(1, 9)))
    with_date = draw.chance(0.3)
    questions = [
        replace(one.question, text=f"Current Date: {today}\nQuestion: {one.question.text}")
        if with_date and not plain
        else one.question
        for one in asked
    ]
    sayings = [saying for one in asked for saying in one.sayings]
    talk = Prose(draw, Style.TALK)
    for saying in sayings:
        sessions[saying.session].exchanges.append(exchange_of(draw, saying, talk, plain=plain))
    for session in sessions:
        session.exchanges = draw.shuffled(session.exchanges)
    sessions = _opened(sessions, talk, plain=plain)
    fill(draw, sessions, _room(length_tokens, questions, sessions, layout), layout)
    context = layout.render(sessions)
    placed = [
        replace(
            question,
            evidence=tuple(
                span
                for saying in one.sayings
                for span in (saying.span, saying.date_span if one.with_dates else None)
                if span is not None
            ),
        )
        for question, one in zip(questions, asked, strict=True)
    ]
    return Task("longmemeval", context, layout.inline, tuple(placed))


def _asked(draw: Draw, sessions: list[Session], length_tokens: int, num_questions: int) -> list[Asked]:
    """Questions of all kinds in turn, as many as are wanted or as leave room for small talk."""
    memories = Memories(draw, sessions)
    most = 2 if length_tokens < SHORT else 4
    kinds = draw.shuffled([kind for kind, (count, _) in memories.makers.items() if count <= most])
    asked: list[Asked] = []
    used = 0
    while len(asked) < num_questions:
        one = memories.makers[kinds[len(asked) % len(kinds)]][1]()
        used += sum(len(saying.text) + len(saying.request) + REMARK_CHARS for saying in one.sayings)
        if asked and used > length_tokens * REMARK_SHARE:
            break
        asked.append(one)
    return asked


def _opened(sessions: list[Session], talk: Prose, *, plain: bool) -> list[Session]:
    """Every session has something said in it; where text is short, the others are left out."""
    for session in sessions:
        if not session.exchanges and not plain:
            session.exchanges.append(Exchange(talk.sentence(), talk.sentence()))
    kept = [session for session in sessions if session.exchanges]
    if not kept:
        kept = sessions[:1]
        kept[0].exchanges.append(Exchange(talk.sentence(), talk.sentence()))
    return kept


def _room(length_tokens: int, questions: list[Question], sessions: list[Session], layout: Layout) -> int:
    """Characters left for small talk."""
    said = sum(
        len(one.user) + len(one.assistant) + layout.exchange_chars
        for each in sessions
        for one in each.exchanges
    )
    heads = sum(len(layout.head(number, session)) for number, session in enumerate(sessions, 1))
    room = document_room(length_tokens, questions) - said - heads
    return room - len(layout.intro) + 1 if layout.inline else room + len(SEPARATOR)
