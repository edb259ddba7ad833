"""Near-ties between our selection and the oracle's: which one is taken is no difference, a wider gap is.

Two implementations sum in another order, so entries or experts of almost equal scores may change places.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from unittest.mock import patch

import torch
from torch import Tensor

from forepage.model.indexer import Indexer, IndexerQuery, IndexerTap
from forepage.model.moe import Gate
from forepage_kernels.layout import KeyPool
from forepage_kernels.prefill_attention.reference import selection_mask
from rigs.parity_oracle import Choices

TIE_MARGIN = 1e-5
"""Entries or experts whose scores are closer may be selected either way; then the oracle's are taken."""


@dataclass
class TieBreaker:
    """Stands between the indexers and gates and what they selected; asserts that only near-ties differ.

    `positions` [n] of the tokens now in the model are set before each run of it.
    """

    choices: list[Choices]
    routing: list[Choices]
    positions: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    settled: int = 0
    selections: int = 0
    _selects: int = 0
    _routes: int = 0

    def settle(self, tap: IndexerTap) -> IndexerTap:
        """The tap [n, k] of the next c4 layer, with the oracle's selection where a near-tie decided."""
        choice = self.choices[self._selects % len(self.choices)]
        self._selects += 1
        ours = selection_mask(tap.selected, choice.scores.shape[1])
        selected = tap.selected.clone()
        for row in self._flipped(ours, choice):
            entries = choice.selected[self.positions[row]].nonzero().flatten()
            selected[row] = -1
            selected[row, : entries.shape[0]] = entries
        return replace(tap, selected=selected)

    def settle_experts(self, experts: Tensor) -> tuple[Tensor, list[int]]:
        """Experts [n, k] of the next layer that scores them, the oracle's where a near-tie decided; these."""
        choice = self.routing[self._routes % len(self.routing)]
        self._routes += 1
        ours = torch.zeros(experts.shape[0], choice.scores.shape[1], dtype=torch.bool).scatter_(1, experts, 1)
        rows = self._flipped(ours, choice)
        settled = experts.clone()
        for row in rows:
            settled[row] = choice.selected[self.positions[row]].nonzero().flatten()
        return settled, rows

    def _flipped(self, ours: Tensor, choice: Choices) -> list[int]:
        """Rows in which ours bool [n, N] is another set than the oracle's."""
        theirs, scores = choice.selected[self.positions], choice.scores[self.positions]  # [n, N]
        rows: list[int] = (ours != theirs).any(1).nonzero().flatten().tolist()
        for row in rows:
            rivals = scores[row, ours[row] ^ theirs[row]]
            gap = float(rivals.max() - rivals.min())
            assert gap < TIE_MARGIN, f"token {int(self.positions[row])}: selected across a gap of {gap}"
        self.selections += ours.shape[0]
        self.settled += len(rows)
        return rows

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Every indexer's and every scoring gate's selection passes through here."""
        select, select_prefill, route = Indexer.select, Indexer.select_prefill, Gate.route

        def decode(
            indexer: Indexer, ask: IndexerQuery, pool: KeyPool, *, block_table: Tensor, visible: Tensor
        ) -> IndexerTap:
            tap = select(indexer, ask, pool, block_table=block_table, visible=visible)
            return self.settle(tap)

        def prefill(
            indexer: Indexer, ask: IndexerQuery, pool: KeyPool, *, slots: Tensor, start: int
        ) -> IndexerTap:
            tap = select_prefill(indexer, ask, pool, slots=slots, start=start)
            return self.settle(tap)

        def to_experts(gate: Gate, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
            experts, weights = route(gate, x, tokens)
            if gate.expert_ids is not None:
                return experts, weights
            experts, rows = self.settle_experts(experts)
            given = replace(gate, expert_ids=experts)  # routed by number, as a hash layer is
            weights[rows] = route(given, x[rows], torch.tensor(rows, dtype=torch.int64))[1]
            return experts, weights

        with (
            patch.object(Indexer, "select", decode),
            patch.object(Indexer, "select_prefill", prefill),
            patch.object(Gate, "route", to_experts),
        ):
            yield
