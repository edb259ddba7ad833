"""One request as its user saw it, put together from the events of its stream."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from loadtest.quality.items import Item

REFUSALS = (429, 503)


@dataclass(frozen=True)
class Sample:
    """Times in seconds since the request was sent, `sent_s` since the load began.

    gaps_s: between pieces of text; status: of HTTP, 0 without an answer; error: why there is no whole answer.
    """

    sent_s: float
    length_tokens: int
    turn: int
    needs_past: bool | None
    status: int
    error: str | None = None
    ttft_s: float | None = None
    total_s: float = 0.0
    gaps_s: tuple[float, ...] = ()
    score: float = 0.0
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    residency: dict[str, Any] = field(default_factory=dict)

    @property
    def is_refused(self) -> bool:
        """Whether the server said that it has no room now."""
        return self.status in REFUSALS

    @property
    def tpot_s(self) -> float | None:
        """Time per token after the first."""
        if self.ttft_s is None or self.completion_tokens < 2:
            return None
        return (self.total_s - self.ttft_s) / (self.completion_tokens - 1)


def sample_of(
    item: Item, turn: int, status: int, sent_s: float, lines: Iterable[tuple[float, str]]
) -> Sample:
    """Read a stream's lines, each with the time it came at; a stream that ends early is an error."""
    text, error = "", None
    usage: dict[str, Any] = {}
    at_s: list[float] = []
    ended_s, done = 0.0, False
    for ended_s, event in _events(lines):
        if event is None:
            done = True
            break
        if "error" in event:
            error = str(event["error"].get("code") or event["error"].get("message"))
            break
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            piece = choice["delta"].get("content") or choice["delta"].get("reasoning_content")
            if piece:
                text += piece
                at_s.append(ended_s)
    if error is None and not done:
        error = "stream_cut"
    details = usage.get("prompt_tokens_details") or {}
    return Sample(
        sent_s=sent_s,
        length_tokens=item.length_tokens,
        turn=turn,
        needs_past=item.outside_tail,
        status=status,
        error=error,
        ttft_s=at_s[0] if at_s else None,
        total_s=ended_s,
        gaps_s=tuple(later - earlier for earlier, later in pairwise(at_s)),
        score=item.score(text) if error is None else 0.0,
        text=text,
        prompt_tokens=usage.get("prompt_tokens") or 0,
        cached_tokens=details.get("cached_tokens") or 0,
        completion_tokens=usage.get("completion_tokens") or 0,
        residency=usage.get("forepage") or {},
    )


def failed_sample(item: Item, turn: int, status: int, sent_s: float, error: str, *, total_s: float) -> Sample:
    """A request that got no stream."""
    return Sample(
        sent_s=sent_s,
        length_tokens=item.length_tokens,
        turn=turn,
        needs_past=item.outside_tail,
        status=status,
        error=error,
        total_s=total_s,
    )


def _events(lines: Iterable[tuple[float, str]]) -> Iterator[tuple[float, dict[str, Any] | None]]:
    """Parsed `data:` lines; None is `[DONE]`."""
    for at_s, line in lines:
        data = line.removeprefix("data:").strip()
        if line.startswith("data:"):
            yield at_s, None if data == "[DONE]" else json.loads(data)
