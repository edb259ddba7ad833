"""Names for things to look up: every one different, many of them nearly the same."""

from forepage.suites.draw import Draw
from forepage.suites.lexicon import split_of

MAX_TRIES = 20
"""After this many repeats a key gets a number behind it."""


class Keys:
    """Draws keys of one kind and never the same twice."""

    def __init__(self, draw: Draw, kind: str) -> None:
        self._draw = draw
        self._kind = kind
        self._given: list[str] = []
        self._known: set[str] = set()

    def new(self) -> str:
        """A key that is like no other on purpose."""
        for _ in range(MAX_TRIES):
            key = self._drawn()
            if key not in self._known:
                return self._give(key)
        return self._give(f"{self._drawn()}-{len(self._given)}")

    def near(self) -> str:
        """A key that differs in little from one that was given before."""
        if not self._given:
            return self.new()
        for _ in range(MAX_TRIES):
            key = self._changed(self._draw.pick(self._given))
            if key not in self._known:
                return self._give(key)
        return self.new()

    def given(self) -> str | None:
        """One of the keys that were given before, if any."""
        return self._draw.pick(self._given) if self._given else None

    def _give(self, key: str) -> str:
        self._given.append(key)
        self._known.add(key)
        return key

    def _drawn(self) -> str:
        draw = self._draw
        if self._kind == "word":
            noun = draw.noun() if draw.chance(0.8) else draw.made_up()
            return f"{draw.adjective()}-{noun}" if draw.chance(0.85) else noun
        if self._kind == "name":
            return draw.person()
        if self._kind == "made_up":
            return draw.made_up(draw.between(2, 3))
        if self._kind == "code":
            return f"{draw.letters(2)}{draw.digits(4)}"
        return draw.uuid()

    def _changed(self, key: str) -> str:
        """Another word beside the same one, or one character exchanged for another of its sort."""
        draw = self._draw
        if self._kind == "word" and "-" in key and draw.chance(0.6):
            adjective, noun = key.split("-", 1)
            return f"{draw.adjective()}-{noun}" if draw.chance(0.5) else f"{adjective}-{draw.noun()}"
        if self._kind == "name" and draw.chance(0.6):
            first, last = key.split(" ", 1)
            return (
                f"{draw.pick(draw.words.first_names)} {last}"
                if draw.chance(0.5)
                else f"{first} {draw.surname()}"
            )
        at = draw.below(len(key))
        old = key[at]
        if not old.isalnum():
            return key
        sort = (
            "0123456789" if old.isdigit() else "abcdef" if self._kind == "uuid" else "abcdefghijklmnoprstuvwy"
        )
        new = draw.pick(sort)
        changed = key[:at] + (new.upper() if old.isupper() else new) + key[at + 1 :]
        own = all(split_of(word) is draw.split for word in changed.replace(" ", "-").split("-"))
        return changed if own or self._kind in ("uuid", "code") else key
