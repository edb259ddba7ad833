"""MRCR-style tasks: many requests for short texts, some of them equal; repeat the n-th answer to one."""

from dataclasses import dataclass, replace

from forepage.suites.draw import Draw
from forepage.suites.layout import ASSISTANT_CONTROLS, SEPARATOR, USER_CONTROLS, document_room
from forepage.suites.pattern import plural
from forepage.suites.prose import Prose, Style
from forepage.suites.task import Evidence, Question, Task, Turn
from forepage.suites.wording import repeats as wording

CODE_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
ASKED_SHARE = 0.6
"""Most of the text that groups which are asked about take."""


@dataclass(frozen=True)
class Written:
    """One request with its answer; `group` and `place` say which of equal requests it is, or -1."""

    request: str
    text: str
    group: int = -1
    place: int = -1

    @property
    def tokens(self) -> int:
        """What the two turns cost."""
        return len(self.request) + len(self.text) + USER_CONTROLS + ASSISTANT_CONTROLS


class Writer:
    """Makes requests and answers; a pair of form and topic belongs to one group."""

    def __init__(self, draw: Draw, text_chars: int) -> None:
        self._draw = draw
        self._chars = text_chars
        self._prose = Prose(draw, Style.ESSAY)
        self._talk = Prose(draw, Style.TALK)
        self._taken: set[tuple[str, str]] = set()
        self._topics: list[str] = []

    def subject(self) -> tuple[str, str]:
        """A form and a topic that were not asked for together before; often one of both was."""
        draw = self._draw
        while True:
            if not self._topics or draw.chance(0.5):
                noun = plural(draw.noun())
                self._topics.append(f"{draw.adjective()} {noun}" if draw.chance(0.4) else noun)
            pair = draw.pick(wording.FORMS[draw.split.value]), draw.pick(self._topics)
            if pair not in self._taken:
                self._taken.add(pair)
                return pair

    def write(self, form: str, topic: str, group: int = -1, place: int = -1) -> Written:
        """One more request for a form about a topic, with an answer of its own."""
        draw = self._draw
        request = draw.pick(draw.wording(wording.REQUESTS)).expand(draw, {"form": form, "topic": topic})
        prose = draw.pick((self._prose, self._prose, self._talk))
        chars = draw.between(self._chars * 2 // 3, self._chars)
        text = f"{draw.adjective().capitalize()} {topic}! {prose.some(max(12, chars - len(topic) - 12))}"
        return Written(request, text, group, place)


def mrcr(draw: Draw, length_tokens: int, num_questions: int) -> Task:
    """A conversation of requests and answers, and questions for the n-th of equal ones."""
    writer = Writer(draw, min(240, max(40, length_tokens // 12)))
    asked: list[Written] = []
    questions: list[Question] = []
    used = 0
    while len(questions) < num_questions:
        size = 2 if length_tokens < 2048 else draw.pick((2, 2, 4, 4, 4, 8))
        form, topic = writer.subject()
        group = [writer.write(form, topic, len(asked) + at, at) for at in range(size)]
        used += sum(one.tokens for one in group)
        if asked and used > length_tokens * ASKED_SHARE:
            break
        asked += group
        places = draw.some(range(size), min(size // 2, num_questions - len(questions)))
        questions += [_question(draw, form, topic, group, place) for place in places]
    room = document_room(length_tokens, questions) + len(SEPARATOR) - sum(one.tokens for one in asked)
    others: list[Written] = []
    while (room := room - (other := writer.write(*writer.subject())).tokens) >= 0:
        others.append(other)
    room += other.tokens
    turns = _turns(draw, asked, others, room)
    place_of = {turn.text: at for at, turn in enumerate(turns)}
    return Task("mrcr", turns, False, tuple(_placed(question, place_of, turns) for question in questions))


def _question(draw: Draw, form: str, topic: str, group: list[Written], place: int) -> Question:
    code = "".join([draw.pick(CODE_LETTERS) for _ in range(10)]) if draw.chance(0.8) else ""
    nth, word = wording.ORDINALS[place]
    asking = draw.wording(wording.QUESTIONS if code else wording.PLAIN_QUESTIONS)
    as_published = bool(code) and draw.chance(0.3 if draw.training else 0.6)
    pattern = wording.OPENAI_QUESTION if as_published else draw.pick(asking)
    values = {"code": code, "form": form, "topic": topic}
    said = pattern.expand(draw, values | {"nth": nth if as_published or draw.chance(0.5) else word})
    text = group[place].text
    return Question(said, code + text, (code, text), (), f"mrcr_{len(group)}")


def _turns(draw: Draw, asked: list[Written], others: list[Written], room: int) -> tuple[Turn, ...]:
    """All exchanges in random order, equal requests in theirs; one of them is `room` characters longer."""
    queues: dict[int, list[Written]] = {}
    for one in asked:
        queues.setdefault(one.group - one.place, []).append(one)
    slots = draw.shuffled([key for key, queue in queues.items() for _ in queue] + [-1] * len(others))
    rest = iter(others)
    heads = {key: iter(queue) for key, queue in queues.items()}
    turns: list[Turn] = []
    for slot in slots:
        one = next(rest) if slot < 0 else next(heads[slot])
        request, text = one.request, one.text
        if room > 5 and (slot < 0 or not others):
            pad = Prose(draw, Style.TALK).some(room - 1)
            request, room = f"{pad} {request}", 0
        turns += [Turn("user", request), Turn("assistant", text)]
    return tuple(turns)


def _placed(question: Question, place_of: dict[str, int], turns: tuple[Turn, ...]) -> Question:
    """The evidence: the answer that is asked for, and its request."""
    at = place_of[question.expected[1]]
    return replace(
        question,
        evidence=(Evidence(at, 0, len(turns[at].text)), Evidence(at - 1, 0, len(turns[at - 1].text))),
    )
