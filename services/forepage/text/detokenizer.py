"""Token ids to text as they come: whole characters only, and nothing of a stop string.

A character is held back until its bytes are complete (or can't become valid: then U+FFFD), and text is
held back while it may be the start of a stop string. What is emitted doesn't depend on how the ids were
cut into calls.
"""

import codecs
from collections.abc import Collection, Iterable, Sequence

from forepage.text.tokenizer import Tokenizer


class StopMatcher:
    """Passes text through up to the first stop string.

    First is the one that is complete first; of those that end together, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """The text that can be shown now; nothing after a match."""
        if self.matched is not None or not self._stops:
            return "" if self.matched is not None else text
        seen = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := seen.find(stop)) >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return seen[:start]
        keep = self._possible_start(seen)
        self._held = seen[len(seen) - keep :]
        return seen[: len(seen) - keep]

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, seen: str) -> int:
        """Length of the longest end of `seen` that begins a stop string."""
        for length in range(min(self._longest - 1, len(seen)), 0, -1):
            end = seen[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


class Detokenizer:
    """The text of one answer, token by token."""

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str] = (), stop_tokens: Collection[int] = ()
    ) -> None:
        """`stop_tokens` have no text; whoever generates ends at them."""
        self._tokenizer = tokenizer
        self._stop_tokens = frozenset(stop_tokens)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = StopMatcher(stops)
        self.num_tokens = 0
        self.saw_stop_token = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self._stops.matched is not None

    def feed(self, ids: Iterable[int]) -> str:
        """Text that these ids complete. Ids behind the one that completed a stop string don't count."""
        pieces: list[str] = []
        for token in ids:
            if self.stopped:
                break
            self.num_tokens += 1
            if token in self._stop_tokens:
                self.saw_stop_token = True
                continue
            text = self._decoder.decode(self._tokenizer.decode_bytes((token,)))
            pieces.append(self._stops.feed(text))
        return "".join(pieces)

    def finish(self) -> str:
        """The rest, when no more ids come: a broken character becomes U+FFFD."""
        if self.stopped:
            return ""
        return self._stops.feed(self._decoder.decode(b"", final=True)) + self._stops.finish()
