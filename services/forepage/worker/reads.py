"""Which blocks were read for an answer: where the evidence of its steps lay. Counted for who asks."""

from collections import defaultdict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from forepage.kv.evidence import EVIDENCE_PROBABILITY
from forepage.kv.geometry import BLOCK_ENTRIES
from forepage.kv.ids import BlockIdx
from forepage.model.indexer import IndexerTap


@dataclass
class Reads:
    """Mass of evidence by block over the steps of one sequence; `newest` are the blocks of the last step."""

    num_steps: int = 0
    newest: frozenset[BlockIdx] = frozenset()
    _mass: dict[BlockIdx, float] = field(default_factory=lambda: defaultdict(float))

    def add_step(self, taps: Seq[IndexerTap], row: int) -> None:
        """What one step selected in each c4 layer; entries below the evidence's share count as not read."""
        self.num_steps += 1
        read: set[BlockIdx] = set()
        for tap in taps:
            entries, scores = tap.chosen(row)
            shares = scores.double().softmax(0)  # of none: none
            is_evidence = shares >= EVIDENCE_PROBABILITY
            blocks = (entries[is_evidence] // BLOCK_ENTRIES).tolist()
            for block, share in zip(blocks, shares[is_evidence].tolist(), strict=True):
                self._mass[BlockIdx(block)] += share / len(taps)
                read.add(BlockIdx(block))
        self.newest = frozenset(read)

    def mean_mass(self) -> list[tuple[BlockIdx, float]]:
        """Blocks that were read, ascending, and their share of the softmax, mean over layers and steps."""
        return [(block, mass / self.num_steps) for block, mass in sorted(self._mass.items())]
