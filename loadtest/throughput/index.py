"""`python -m loadtest.throughput.index '{...}'`: the index process, its scores replaced by a trace.

It scores as always, on the keys of the history, so that a plan takes as long as it does; then the trace says
which blocks come out above the threshold. The argument is a `Trace` as JSON.
"""

import json
import sys
from collections.abc import Callable, Sequence

from torch import Tensor

from forepage.coldpool.records import SlotRef
from forepage.index.key_store import MappedKeys
from forepage.index.scorer import BlockScorer, BlockScores, Scorer
from forepage.index.server import run
from forepage.rpc.edge import run_until_signal
from forepage.settings_environment import load_settings
from loadtest.throughput.trace import Trace

WANTED = 0.99
"""Above every threshold in use."""


class TracedScorer:
    """The memory indexer's work, a trace's scores."""

    def __init__(self, scorer: BlockScorer, trace: Trace) -> None:
        self._scorer = scorer
        self._trace = trace

    def score_blocks(
        self,
        keys: MappedKeys,
        blocks: Sequence[SlotRef],
        *,
        hidden: Tensor,
        position: int,
        threshold: float,
        check: Callable[[], None],
    ) -> BlockScores:
        """As `Scorer.score_blocks`, but for the scores."""
        found = self._scorer.score_blocks(
            keys, blocks, hidden=hidden, position=position, threshold=threshold, check=check
        )
        wanted = set(self._trace.blocks(len(blocks), position))
        scores = tuple(WANTED if idx in wanted else 0.0 for idx in range(len(blocks)))
        return BlockScores(scores, found.num_scored)


def main(argument: str) -> None:
    """Serve until a signal."""
    trace = Trace(**json.loads(argument))

    def scoring(scorer: Scorer) -> BlockScorer:
        return TracedScorer(scorer, trace)

    run_until_signal(lambda stop: run(load_settings(), stop, scoring))


if __name__ == "__main__":
    main(sys.argv[1])
