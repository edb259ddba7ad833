"""Dated chat sessions: exchanges of a user and an assistant, laid out as turns or as one long document."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta

from forepage.suites.draw import Draw
from forepage.suites.layout import ASSISTANT_CONTROLS, USER_CONTROLS
from forepage.suites.prose import Prose, Style
from forepage.suites.task import Evidence, Turn
from forepage.suites.wording import memory as wording

WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


@dataclass(eq=False)
class Saying:
    """One remark that matters: who says it, in which session; for an assistant's, what the user asked."""

    text: str
    session: int
    request: str = ""
    span: Evidence | None = None
    date_span: Evidence | None = None


@dataclass
class Exchange:
    """A user's text and the assistant's reply; `saying` is part of one of them."""

    user: str
    assistant: str
    saying: Saying | None = None


@dataclass
class Session:
    """One dated conversation."""

    date: datetime
    exchanges: list[Exchange] = field(default_factory=list)

    @property
    def day(self) -> str:
        """The date as answers give it."""
        return f"{self.date:%Y/%m/%d}"


def stamp(date: datetime) -> str:
    """Date, weekday and time as LongMemEval writes them."""
    return f"{date:%Y/%m/%d} ({WEEKDAYS[date.weekday()]}) {date:%H:%M}"


def dated(draw: Draw, count: int) -> list[Session]:
    """Empty sessions, each on a later day than the one before."""
    date = datetime(draw.between(2019, 2024), draw.between(1, 12), draw.between(1, 28), 8, 0)
    sessions = []
    for _ in range(count):
        date += timedelta(days=draw.pick((1, 1, 2, 3, 5)))
        sessions.append(Session(date + timedelta(minutes=draw.between(0, 840))))
    return sessions


def exchange_of(draw: Draw, saying: Saying, talk: Prose, *, plain: bool) -> Exchange:
    """A remark among small talk."""
    before = "" if plain or draw.chance(0.5) else talk.sentence() + " "
    after = "" if plain or draw.chance(0.5) else " " + talk.sentence()
    if saying.request:
        return Exchange(before + saying.request, f"{saying.text}{after}", saying)
    reply = draw.wording(wording.REPLIES).expand(draw)
    return Exchange(before + saying.text + after, reply, saying)


def fill(draw: Draw, sessions: list[Session], room: int, layout: "Layout") -> None:
    """Add small talk to sessions until `room` characters are used up, to within 10."""
    talk, prose = Prose(draw, Style.TALK), Prose(draw, Style.MIXED)
    while True:
        user = talk.sentence() if draw.chance(0.7) else f"{talk.sentence()} {talk.sentence()}"
        reply = prose if draw.chance(0.3) else talk
        assistant = " ".join([reply.sentence() for _ in range(draw.between(1, 4))])
        cost = len(user) + len(assistant) + layout.exchange_chars
        session = draw.pick(sessions)
        if cost + 40 > room:
            break
        session.exchanges.insert(draw.below(len(session.exchanges) + 1), Exchange(user, assistant))
        room -= cost
    rest = room - layout.exchange_chars
    if rest > 24:
        user = talk.some(min(60, rest // 2))
        session.exchanges.append(Exchange(user, talk.some(rest - len(user))))
    elif room > 4:
        exchange = draw.pick([one for each in sessions for one in each.exchanges])
        tail = exchange.saying is None or not exchange.saying.request
        if tail:
            exchange.assistant += " " + talk.some(room - 1)
        else:
            exchange.user = talk.some(room - 1) + " " + exchange.user


@dataclass(frozen=True)
class Layout:
    """How sessions become turns: as a chat of many turns, or as one document (LongMemEval's own prompt)."""

    inline: bool
    intro: str

    @property
    def exchange_chars(self) -> int:
        """What an exchange costs beside its texts."""
        return len("user: \nassistant: \n") if self.inline else USER_CONTROLS + ASSISTANT_CONTROLS

    def head(self, number: int, session: Session) -> str:
        """The line or lines that date a session."""
        if self.inline:
            return f"\n### Session {number}:\nSession Date: {stamp(session.date)}\nSession Content:\n"
        return f"[{stamp(session.date)}]\n"

    def render(self, sessions: list[Session]) -> tuple[Turn, ...]:
        """The turns; every saying learns where it stands."""
        return self._document(sessions) if self.inline else self._turns(sessions)

    def _turns(self, sessions: list[Session]) -> tuple[Turn, ...]:
        turns: list[Turn] = []
        for number, session in enumerate(sessions, 1):
            head = self.head(number, session)
            date = Evidence(len(turns), 0, len(head) - 1)
            for exchange in session.exchanges:
                for role, text in (("user", head + exchange.user), ("assistant", exchange.assistant)):
                    _place(exchange.saying, role, len(turns), 0, text, date)
                    turns.append(Turn("user" if role == "user" else "assistant", text))
                head = ""
        return tuple(turns)

    def _document(self, sessions: list[Session]) -> tuple[Turn, ...]:
        parts = [self.intro]
        at = len(self.intro)
        for number, session in enumerate(sessions, 1):
            head = self.head(number, session)
            parts.append(head)
            date = Evidence(0, at, at + len(head) - 1)
            at += len(head)
            for exchange in session.exchanges:
                for role, text in (("user", exchange.user), ("assistant", exchange.assistant)):
                    line = f"{role}: {text}\n"
                    _place(exchange.saying, role, 0, at, line, date)
                    parts.append(line)
                    at += len(line)
        return (Turn("user", "".join(parts).rstrip("\n")),)


def _place(saying: Saying | None, role: str, turn: int, start: int, text: str, date: Evidence) -> None:
    """Note where a saying stands if this text, said by this role, is the one that has it."""
    if saying is None or (role == "assistant") != bool(saying.request):
        return
    at = start + text.index(saying.text)
    saying.span = Evidence(turn, at, at + len(saying.text))
    saying.date_span = date
