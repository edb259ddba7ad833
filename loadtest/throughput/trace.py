"""Which blocks a long conversation wants, interval by interval, as recorded ones do: for random weights.

A stateless trace: it is a function of the position alone, so an index that asks again gets the same. The
candidates are cut into as many strata as blocks are wanted, and each stratum wants one of its blocks; from
one interval to the next a share of the strata, another each time, goes on to another block.
"""

from dataclasses import dataclass
from random import Random

SEED = 0


@dataclass(frozen=True)
class Trace:
    """`overlap` is the share of an interval's blocks that the next one wants too."""

    wanted_blocks: int
    interval_steps: int
    overlap: float

    def blocks(self, num_candidates: int, position: int) -> list[int]:
        """What the interval after `position` wants of blocks 0..num_candidates-1, ascending."""
        count = min(self.wanted_blocks, num_candidates)
        interval = position // self.interval_steps
        random = Random(SEED)
        chosen = []
        for stratum in range(count):
            first = stratum * num_candidates // count
            size = (stratum + 1) * num_candidates // count - first
            start, phase = random.randrange(1 << 30), random.random()
            moves = int(interval * (1 - self.overlap) + phase)
            chosen.append(first + (start + moves) % size)
        return chosen
