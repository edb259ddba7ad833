"""Labels: which entries the coming steps of an answer will want, by rule, for plans made at some rows.

A plan made at row r serves rows r + 1 .. r + interval of the same answer, cut at its end. Only entries of
blocks before the resident tail are candidates, as the worker asks. A plan with nothing to want has no
positive: nothing is made up for it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from forepage.kv.geometry import BLOCK_ENTRIES, C4_RATIO
from forepage.training.indexer.config import LabelConfig, LabelRule
from forepage.training.indexer.features import Features

BLOCK_TOKENS = BLOCK_ENTRIES * C4_RATIO


@dataclass(frozen=True)
class Plans:
    """Plans of one text: which rows they are made at, and what each serves."""

    rows: Tensor  # i64 [B]
    ends: Tensor  # i64 [B]: one after the last row served
    candidates: Tensor  # i64 [B]: blocks 0..n-1 are candidates

    def __getitem__(self, places: Tensor) -> "Plans":
        """Some of them."""
        return Plans(self.rows[places], self.ends[places], self.candidates[places])

    def __len__(self) -> int:
        return self.rows.shape[0]


@dataclass(frozen=True)
class WantedEntries:
    """What each row wants: entries of row r are [starts[r], starts[r + 1])."""

    starts: Tensor  # i64 [T + 1]
    entries: Tensor  # i64 [K]
    layers: Tensor  # i64 [K]: c4 index; vote: -1
    masses: Tensor  # f32 [K]


def possible_plans(features: Features, *, interval: int, recent_tokens: int) -> Plans:
    """One for each row that has a row to serve and a block to choose."""
    answers, count = features.answers, features.num_rows
    rows = torch.arange(count, device=answers.device)
    _, sizes = torch.unique_consecutive(answers, return_counts=True)
    answer_ends = sizes.cumsum(0).repeat_interleave(sizes)  # [T]
    ends = torch.minimum(rows + 1 + interval, answer_ends)
    tail = (features.positions.long() + 1 - recent_tokens).clamp(min=0) // BLOCK_TOKENS
    usable = (ends > rows + 1) & (tail > 0)
    return Plans(rows[usable], ends[usable], tail[usable])


def is_first(features: Features, plans: Plans) -> Tensor:
    """bool [B]: which plans are made at the last token of a question."""
    before = (plans.rows - 1).clamp(min=0)
    return (plans.rows == 0) | (features.answers[before] != features.answers[plans.rows])


def served_plans(features: Features, plans: Plans, interval: int) -> Plans:
    """Those that serving would make: at a question's last token and every `interval` steps from there."""
    _, inverse, sizes = torch.unique_consecutive(features.answers, return_inverse=True, return_counts=True)
    begins = (sizes.cumsum(0) - sizes)[inverse]  # [T]
    at_boundary = (plans.rows - begins[plans.rows]) % interval == 0
    return plans[at_boundary.nonzero().squeeze(1)]


def wanted_entries(features: Features, label: LabelConfig, num_c4_layers: int) -> WantedEntries:
    """Apply the rule to every row."""
    golden = features.golden
    rows_of = golden.row_ids()
    rows, layers = rows_of // num_c4_layers, rows_of % num_c4_layers
    if label.rule in (LabelRule.EVIDENCE, LabelRule.OWN_LAYER):
        kept = golden.is_evidence()
    else:
        kept = golden.in_mass_set(label.mass)
    rows, layers = rows[kept], layers[kept]
    entries, masses = golden.entries[kept].long(), golden.masses[kept]
    if label.rule is LabelRule.VOTE:
        pairs = rows * (features.num_entries + 1) + entries
        pairs, inverse, votes = pairs.unique(return_inverse=True, return_counts=True)
        masses = masses.new_zeros(len(pairs)).index_add_(0, inverse, masses)
        elected = votes >= label.min_layers
        pairs, masses = pairs[elected], masses[elected]
        rows, entries = pairs // (features.num_entries + 1), pairs % (features.num_entries + 1)
        layers = torch.full_like(rows, -1)
    counts = torch.bincount(rows, minlength=features.num_rows)
    starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return WantedEntries(starts, entries, layers, masses)


def served_items(wanted: WantedEntries, plans: Plans) -> tuple[Tensor, Tensor]:
    """Every wanted entry of the rows that each plan serves: (plan i64 [S], place in `wanted` i64 [S])."""
    begin, end = wanted.starts[plans.rows + 1], wanted.starts[plans.ends]
    sizes = end - begin
    plan = torch.repeat_interleave(sizes)
    offset = torch.arange(plan.shape[0], device=plan.device) - (sizes.cumsum(0) - sizes)[plan]
    return plan, begin[plan] + offset


def wanted_mass(wanted: WantedEntries, plans: Plans, num_entries: int, layer: int | None = None) -> Tensor:
    """Mass that each plan's rows put on wanted candidates: f32 [B, N]; `layer`: a c4 index alone.

    Above 0 exactly where an entry is wanted.
    """
    plan, item = served_items(wanted, plans)
    entries = wanted.entries[item]
    kept = entries < plans.candidates[plan] * BLOCK_ENTRIES
    if layer is not None:
        kept &= wanted.layers[item] == layer
    mass = torch.zeros(len(plans), num_entries, device=entries.device)
    return mass.index_put_((plan[kept], entries[kept]), wanted.masses[item[kept]], accumulate=True)
