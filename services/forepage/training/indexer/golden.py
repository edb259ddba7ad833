"""What a token needed, as the served model itself says: its best entries by the softmax of its own scores.

A token's indexer selects its top-k of all visible entries; the softmax over these gives each a mass. Kept
are the entries of the *mass set* (the best ones until they hold `mass`, the one that crosses it included)
and all *evidence* (DESIGN 8: at least 1 % each), so that every label rule can be derived later.
The released code kept one entry too many when the first alone held more than `mass`; here it stands alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from forepage.errors import RequestError
from forepage.kv.evidence import EVIDENCE_PROBABILITY


@dataclass(frozen=True)
class Golden:
    """Kept entries of R rows (one token at one layer), row after row, each by falling mass."""

    counts: Tensor  # i32 [R]
    entries: Tensor  # i32 [K]
    masses: Tensor  # f32 [K]

    def row_ids(self) -> Tensor:
        """i64 [K]: the row of each kept entry."""
        return torch.repeat_interleave(self.counts.long())

    def in_mass_set(self, mass: float) -> Tensor:
        """bool [K]: which kept entries a mass set of `mass`, at most that of the dump, has."""
        ends = self.counts.long().cumsum(0)
        running = self.masses.double().cumsum(0)
        starts = torch.cat((running.new_zeros(1), running))[ends - self.counts.long()]  # [R]
        before = running - self.masses.double() - starts[self.row_ids()]
        return before < mass - ROUNDING

    def is_evidence(self) -> Tensor:
        """bool [K]: which hold at least 1 % of their row's mass."""
        return self.masses >= EVIDENCE_PROBABILITY


ROUNDING = 1e-7
"""Masses are fp32: a sum that is `mass` but for rounding has reached it."""


def golden_entries(selected: Tensor, scores: Tensor, *, mass: float) -> Golden:
    """Keep of each row's selection what its mass set or its evidence has.

    Shapes: selected i64 [R, k] (negative: padding), scores f32 [R, k] -> Golden of R rows.
    Of equal scores the lower entry comes first, as the model selects; selected is in ascending order.
    Raises: RequestError unless 0 < mass <= 1.
    """
    if not 0 < mass <= 1:
        raise RequestError(f"mass: {mass} is not in 0..1", "mass")
    scores = scores.double().masked_fill(selected < 0, float("-inf"))
    order = scores.argsort(dim=1, descending=True, stable=True)
    ranked, entries = scores.gather(1, order), selected.gather(1, order)
    shares = torch.softmax(ranked, dim=1).nan_to_num(0.0)  # a row without entries: NaN, nothing kept
    before = shares.cumsum(1) - shares
    kept = (before < mass - ROUNDING) | (shares.float() >= EVIDENCE_PROBABILITY)
    kept &= (entries >= 0) & (shares > 0)
    return Golden(
        counts=kept.sum(1).to(torch.int32),
        entries=entries[kept].to(torch.int32),
        masses=shares[kept].float(),
    )
