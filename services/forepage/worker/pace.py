"""How much of a prefill chunk goes between two decode steps: what the settings let a step grow by.

What decode steps and the parts of chunks took lately decides it, never a constant. A chunk keeps its size,
and so its bits: only how many of its parts are done at a time changes.
"""

from collections import deque
from collections.abc import Sequence as Seq
from statistics import fmean, median

DECODE_STEPS, CHUNKS = 15, 5
"""So many of the newest count: their median, so that one that was compiled or interrupted does not."""

Lately = deque[float]


class Pace:
    """Owner of the measurements; milliseconds throughout."""

    def __init__(self, num_parts: int, share: float) -> None:
        """`num_parts` of a chunk; `share` of the time is prefill's while others decode, 1: any."""
        self._num_parts = num_parts
        self._share = share
        self._decode_ms: Lately = deque(maxlen=DECODE_STEPS)
        self._part_ms: dict[int, list[Lately]] = {}
        """By size of the chunk, a power of two that holds its tokens, and part."""

    def saw_decode(self, took_ms: float) -> None:
        """A decode step took so long."""
        self._decode_ms.append(took_ms)

    def saw_parts(self, num_tokens: int, first: int, count: int, took_ms: float) -> None:
        """Parts first..first+count-1 of a chunk of so many tokens took so long together."""
        empty: list[Lately] = [deque(maxlen=CHUNKS) for _ in range(self._num_parts)]
        for part in self._part_ms.setdefault(_size(num_tokens), empty)[first : first + count]:
            part.append(took_ms / count)

    def next_parts(self, num_tokens: int, first: int, *, beside_decode: bool) -> int:
        """How many parts from `first` on come next of a chunk of so many tokens; all if nobody waits."""
        left = self._num_parts - first
        if self._share == 1.0 or not beside_decode:
            return left
        expected_ms = self._expected_ms(num_tokens)
        if expected_ms is None or not self._decode_ms:
            return 1
        return parts_within(expected_ms[first:], median(self._decode_ms) * self._share / (1 - self._share))

    def _expected_ms(self, num_tokens: int) -> list[float] | None:
        """By part: of chunks as large, else of the next larger ones, else of smaller ones in proportion."""
        if not self._part_ms:
            return None
        size = _size(num_tokens)
        larger = [known for known in self._part_ms if known >= size]
        known = min(larger) if larger else max(self._part_ms)
        taken = [median(part) if part else None for part in self._part_ms[known]]
        mean_ms = fmean(ms for ms in taken if ms is not None)
        return [max(1.0, size / known) * (mean_ms if ms is None else ms) for ms in taken]


def parts_within(expected_ms: Seq[float], budget_ms: float) -> int:
    """How many of the next parts fit into the budget together; one at least, or nothing would ever end."""
    spent_ms, count = 0.0, 0
    for part_ms in expected_ms:
        spent_ms += part_ms
        if spent_ms > budget_ms:
            break
        count += 1
    return max(1, count)


def _size(num_tokens: int) -> int:
    return 1 << (num_tokens - 1).bit_length()
