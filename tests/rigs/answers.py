"""Answers as a parser tells them apart, gathered: what a client has in the end."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from forepage.text.answer_parser import AnswerParser, ArgumentsDelta, CallDelta, Delta, ReasoningDelta
from forepage.text.messages import ThinkingMode


@dataclass
class Gathered:
    """An answer; calls are names and argument texts."""

    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)

    def add(self, deltas: Iterable[Delta]) -> None:
        """As a client concatenates them."""
        for delta in deltas:
            if isinstance(delta, CallDelta):
                assert delta.index == len(self.calls)
                self.calls.append((delta.name, ""))
            elif isinstance(delta, ArgumentsDelta):
                assert delta.index == len(self.calls) - 1
                assert delta.text
                name, arguments = self.calls[-1]
                self.calls[-1] = (name, arguments + delta.text)
            else:
                assert delta.text
                if isinstance(delta, ReasoningDelta):
                    self.reasoning += delta.text
                else:
                    self.content += delta.text

    @property
    def arguments(self) -> list[Any]:
        """Decoded; fails for a call that was cut off."""
        return [json.loads(arguments) for _, arguments in self.calls]


def parsed(
    pieces: Iterable[str],
    *,
    thinking: bool = False,
    with_tools: bool = True,
    complete: bool = True,
    max_calls: int | None = None,
) -> Gathered:
    """What comes of these pieces."""
    mode = ThinkingMode.THINKING if thinking else ThinkingMode.CHAT
    parser = AnswerParser(mode, with_tools=with_tools, max_calls=max_calls)
    gathered = Gathered()
    for piece in pieces:
        gathered.add(parser.feed(piece))
    gathered.add(parser.finish(complete=complete))
    assert parser.num_calls == len(gathered.calls)
    return gathered
