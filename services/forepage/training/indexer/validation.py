"""How an indexer does on the plans that serving would make, over the full candidate set, never a sample.

A cell is one candidate block of one plan: its score at each target layer, and its *worth*: what having it
adds to evidence recall (DESIGN 8), averaged over audited (step, layer) pairs. Recall is the sum of the worth
of what is resident, so every threshold and budget can be read off the cells.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from forepage.errors import RequestError
from forepage.kv.geometry import BLOCK_ENTRIES
from forepage.training.indexer.encoder import DualEncoder, block_best
from forepage.training.indexer.shards import StoredText
from forepage.training.indexer.text_store import LoadedText, TextStore
from forepage.training.indexer.wanted import Plans, served_items

PLANS_AT_ONCE = 64


@dataclass(frozen=True)
class PlanCells:
    """Cells of P plans over G audited (step, layer) pairs with evidence; all on the CPU."""

    logits: Tensor  # f32 [L, cells]
    worth: Tensor  # f64 [cells]
    plan: Tensor  # i64 [cells], ascending
    is_wanted: Tensor  # bool [cells]: holds evidence of some step
    lengths: Tensor  # i64 [P]: of each plan's text
    texts: Tensor  # i64 [P]: which text a plan is of
    tail_worth: Tensor  # f64 [P]: worth of what is resident anyway
    pairs: Tensor  # f64 [P]: audited pairs with evidence that the plan serves
    pair_plan: Tensor  # i64 [G]: of each pair
    item_pair: Tensor  # i64 [items]: evidence entries in candidate blocks
    item_cell: Tensor  # i64 [items]
    pair_size: Tensor  # i64 [G]: evidence entries of a pair, resident anyway or not

    @property
    def num_plans(self) -> int:
        """P."""
        return self.lengths.shape[0]

    def pair_recalls(self, chosen: Tensor) -> Tensor:
        """Evidence recall of each pair when these cells (bool) are resident: f64 [G]."""
        missing = (~chosen[self.item_cell]).double()
        missed = torch.zeros(len(self.pair_size), dtype=torch.float64)
        return 1 - missed.index_add_(0, self.item_pair, missing) / self.pair_size


def validation_cells(
    encoder: DualEncoder, store: TextStore, texts: list[StoredText], advance: Callable[[], None]
) -> PlanCells:
    """Score every served plan of these texts. Raises: RequestError when there is none."""
    parts = []
    for text in texts:
        loaded = store.load(text)
        if len(loaded.served):
            parts.append(_cells(encoder, loaded, len(store.header.spec.c4_layers)))
        advance()
    if not parts:
        raise RequestError("no text has a plan to validate: longer texts are needed", "lengths")
    return _joined(parts)


def _cells(encoder: DualEncoder, text: LoadedText, num_c4_layers: int) -> PlanCells:
    """Of one text."""
    plans, device = text.served, text.keys.device
    blocks = text.num_places // BLOCK_ENTRIES
    grid = torch.cat(
        [
            block_logits(encoder, text, plans[part])
            for part in torch.arange(len(plans), device=device).split(PLANS_AT_ONCE)
        ],
        dim=1,
    )  # [L, P, M]
    is_cell = torch.arange(blocks, device=device) < plans.candidates.unsqueeze(1)  # [P, M]
    cell_of = (is_cell.flatten().cumsum(0) - 1).view_as(is_cell)
    plan, item = served_items(text.evidence, plans)
    block = text.evidence.entries[item] // BLOCK_ENTRIES
    row = torch.searchsorted(text.evidence.starts, item, right=True) - 1
    key = (plan * text.features.num_rows + row) * num_c4_layers + text.evidence.layers[item]
    _, pair, sizes = key.unique(return_inverse=True, return_counts=True)
    pair_plan = torch.empty_like(sizes).index_copy_(0, pair, plan)
    share = 1 / sizes[pair].double()
    far = block < plans.candidates[plan]
    worth = torch.zeros(is_cell.shape, dtype=torch.float64, device=device)
    worth.index_put_((plan[far], block[far]), share[far], accumulate=True)
    tail = torch.zeros(len(plans), dtype=torch.float64, device=device)
    tail.index_add_(0, plan[~far], share[~far])
    length = torch.full((len(plans),), text.features.text.length_tokens)
    return PlanCells(
        logits=grid[:, is_cell].cpu(),
        worth=worth[is_cell].cpu(),
        plan=is_cell.nonzero()[:, 0].cpu(),
        is_wanted=(worth > 0)[is_cell].cpu(),
        lengths=length,
        texts=torch.zeros_like(length),
        tail_worth=tail.cpu(),
        pairs=torch.bincount(pair_plan, minlength=len(plans)).double().cpu(),
        pair_plan=pair_plan.cpu(),
        item_pair=pair[far].cpu(),
        item_cell=cell_of[plan[far], block[far]].cpu(),
        pair_size=sizes.cpu(),
    )


@torch.no_grad()
def block_logits(encoder: DualEncoder, text: LoadedText, plans: Plans) -> Tensor:
    """Best entry of each block: f32 [L, B, M]."""
    features = text.features
    asked = encoder.queries(features.hidden[plans.rows], features.positions[plans.rows])
    return block_best(encoder.all_logits(asked, text.keys))


def _joined(parts: list[PlanCells]) -> PlanCells:
    """Plans, cells and pairs of all texts, numbered on."""
    plans = [0, *torch.tensor([part.num_plans for part in parts]).cumsum(0).tolist()]
    cells = [0, *torch.tensor([len(part.worth) for part in parts]).cumsum(0).tolist()]
    pairs = [0, *torch.tensor([len(part.pair_size) for part in parts]).cumsum(0).tolist()]
    every = list(zip(parts, plans, cells, pairs, strict=False))

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    return PlanCells(
        logits=torch.cat([part.logits for part in parts], dim=1),
        worth=joined("worth"),
        plan=torch.cat([part.plan + plan for part, plan, _, _ in every]),
        is_wanted=joined("is_wanted"),
        lengths=joined("lengths"),
        texts=torch.cat([torch.full_like(part.texts, text) for text, part in enumerate(parts)]),
        tail_worth=joined("tail_worth"),
        pairs=joined("pairs"),
        pair_plan=torch.cat([part.pair_plan + plan for part, plan, _, _ in every]),
        item_pair=torch.cat([part.item_pair + pair for part, _, _, pair in every]),
        item_cell=torch.cat([part.item_cell + cell for part, _, cell, _ in every]),
        pair_size=joined("pair_size"),
    )
