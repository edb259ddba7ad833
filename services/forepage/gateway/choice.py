"""One answer, gathered from its pieces."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from forepage.gateway.logprobs import ScoredToken
from forepage.gateway.replies import FinishReason
from forepage.text.answer_parser import ArgumentsDelta, CallDelta, Delta, ReasoningDelta


@dataclass(frozen=True)
class Piece:
    """What came at once. Tokens whose text is still held back come with a later piece."""

    deltas: Sequence[Delta]
    tokens: Sequence[ScoredToken]


@dataclass(frozen=True)
class Call:
    """A tool call; arguments of one that was cut off are the beginning of a JSON object."""

    name: str
    arguments: str


@dataclass
class Choice:
    """An answer as it grows; `finish_reason` counts once it has ended."""

    finish_reason: FinishReason = "stop"
    tokens: list[ScoredToken] = field(default_factory=list)
    _content: list[str] = field(default_factory=list)
    _reasoning: list[str] = field(default_factory=list)
    _calls: list[tuple[str, list[str]]] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Take a piece."""
        self.tokens.extend(piece.tokens)
        for delta in piece.deltas:
            if isinstance(delta, CallDelta):
                self._calls.append((delta.name, []))
            elif isinstance(delta, ArgumentsDelta):
                self._calls[delta.index][1].append(delta.text)
            else:
                (self._reasoning if isinstance(delta, ReasoningDelta) else self._content).append(delta.text)

    @property
    def content(self) -> str:
        """What it says."""
        return "".join(self._content)

    @property
    def reasoning(self) -> str:
        """What it thought."""
        return "".join(self._reasoning)

    @property
    def calls(self) -> list[Call]:
        """The tools it calls."""
        return [Call(name, "".join(arguments)) for name, arguments in self._calls]
