"""Chooses threshold, target layers and budget: the evidence recall asked for, with the fewest blocks.

Pure functions of validation cells. The recall must hold at every length on its own; what counts is the mean
share of candidate blocks that plans take, each length the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from forepage.errors import RequestError
from forepage.training.indexer.config import CalibrationConfig
from forepage.training.indexer.validation import PlanCells

CURVE_POINTS = 60


@dataclass(frozen=True)
class LengthFigures:
    """Of a choice, on the plans of one length: those it was chosen on, so no forecast for new texts."""

    length_tokens: int
    texts: int  # plans of one text are alike: this, not their number, says how sure the figures are
    plans: int
    evidence_recall: float
    evidence_recall_p01: float  # 1st percentile over audited (step, layer) pairs
    far_recall: float  # of the evidence in candidate blocks alone
    precision: float  # share of the chosen blocks that hold evidence
    blocks: float  # chosen, mean of a plan
    blocks_p99: float
    candidates: float  # mean of a plan
    oracle_blocks: float  # the fewest that reach this recall, had their worth been known


@dataclass(frozen=True)
class Calibration:
    """What to serve with."""

    threshold: float
    layers: tuple[int, ...]  # places among the encoder's target layers
    budget_blocks: int
    reached: bool  # whether the recall asked for was reached at every length
    figures: tuple[LengthFigures, ...]


@dataclass(frozen=True)
class _Choice:
    share: float
    logit: float
    layers: tuple[int, ...]
    budget: int
    recall: float


class CellRanking:
    """Cells in order of one score, and each cell's rank in its plan."""

    def __init__(self, cells: PlanCells, score: Tensor) -> None:
        self._cells = cells
        self.order = score.argsort(descending=True, stable=True)
        by_plan = self.order[cells.plan[self.order].argsort(stable=True)]
        first = torch.searchsorted(cells.plan, torch.arange(cells.num_plans))
        self.rank = torch.empty_like(by_plan)
        self.rank[by_plan] = torch.arange(len(by_plan)) - first[cells.plan[by_plan]]
        self.score = score

    def curve(self, length: int, budget: int) -> tuple[Tensor, Tensor]:
        """Of one length, best cells first, within the budget: recall f64 [n + 1], score f32 [n] of each."""
        cells = self._cells
        of_length = cells.lengths == length
        order = self.order[of_length[cells.plan[self.order]] & (self.rank[self.order] < budget)]
        pairs = cells.pairs[of_length].sum().clamp(min=1)
        tail = cells.tail_worth[of_length].sum()
        taken = torch.cat((torch.zeros(1, dtype=torch.float64), cells.worth[order].cumsum(0)))
        return (tail + taken) / pairs, self.score[order]


def calibrate(cells: PlanCells, config: CalibrationConfig) -> Calibration:
    """The best of all sets of layers and budgets. Raises: RequestError without anything to validate on."""
    if not cells.num_plans or not bool(cells.pairs.sum() > 0):
        raise RequestError("no plan with evidence to validate on: longer texts are needed", "lengths")
    found = [
        choice
        for layers in _layer_sets(cells.logits.shape[0], config)
        for choice in _choices(cells, layers, config)
    ]
    # Where nothing reaches it, the highest recall: then fewest blocks at that.
    best = min(
        found,
        key=lambda one: (
            max(0.0, config.evidence_recall - one.recall),
            one.share,
            len(one.layers),
            one.budget,
        ),
    )
    return Calibration(
        threshold=float(torch.sigmoid(torch.tensor(best.logit, dtype=torch.float64))),
        layers=best.layers,
        budget_blocks=best.budget,
        reached=best.recall >= config.evidence_recall,
        figures=figures(cells, best.layers, best.logit, best.budget),
    )


def figures(cells: PlanCells, layers: Sequence[int], logit: float, budget: int) -> tuple[LengthFigures, ...]:
    """Of a choice, length by length; a block is chosen above the logit and within the budget."""
    ranking = CellRanking(cells, cells.logits[list(layers)].amax(0))
    chosen = (ranking.score > logit) & (ranking.rank < budget)
    return tuple(_figures(cells, chosen, length) for length in _lengths(cells))


def recall_at_budget(cells: PlanCells, budget: int) -> dict[int, float]:
    """Evidence recall per length with the best `budget` blocks of all layers, whatever their score."""
    ranking = CellRanking(cells, cells.logits.amax(0))
    return {length: float(ranking.curve(length, budget)[0][-1]) for length in _lengths(cells)}


def share_for_recall(cells: PlanCells, recall: float, score: Tensor | None = None) -> dict[int, float]:
    """Per length the share of candidate blocks that a threshold alone takes to reach a recall; at most 1."""
    ranking = CellRanking(cells, cells.logits.amax(0) if score is None else score)
    shares = {}
    for length in _lengths(cells):
        curve, _ = ranking.curve(length, len(cells.worth))
        total = max(1, len(curve) - 1)
        shares[length] = min(1.0, _first_at_least(curve, recall) / total)
    return shares


def curve_points(cells: PlanCells, layers: Sequence[int], budget: int) -> Iterator[dict[str, float]]:
    """Points of the final choice's curve: length, threshold, recall and blocks a plan."""
    ranking = CellRanking(cells, cells.logits[list(layers)].amax(0))
    for length in _lengths(cells):
        curve, scores = ranking.curve(length, budget)
        plans = int((cells.lengths == length).sum())
        for taken in torch.linspace(0, len(scores), CURVE_POINTS).long().unique().tolist():
            threshold = float(torch.sigmoid(scores[taken - 1].double())) if taken else 1.0
            yield {
                "length_tokens": length,
                "threshold": threshold,
                "evidence_recall": float(curve[taken]),
                "blocks": taken / plans,
            }


def _choices(cells: PlanCells, layers: tuple[int, ...], config: CalibrationConfig) -> Iterator[_Choice]:
    """One for each budget: the highest threshold that reaches the recall at every length."""
    ranking = CellRanking(cells, cells.logits[list(layers)].amax(0))
    lengths = _lengths(cells)
    for budget in config.budgets:
        logit = float("inf")
        for length in lengths:
            curve, scores = ranking.curve(length, budget)
            taken = min(_first_at_least(curve, config.evidence_recall), len(scores))
            if taken:
                below = scores[taken] if taken < len(scores) else scores[taken - 1] - 1
                logit = min(logit, float((scores[taken - 1] + below) / 2))
        chosen = (ranking.score > logit) & (ranking.rank < budget)
        shares, recalls = [], []
        for length in lengths:
            of_length = (cells.lengths == length)[cells.plan]
            shares.append(float(chosen[of_length].double().mean()))
            recalls.append(_recall(cells, chosen, length))
        yield _Choice(sum(shares) / len(shares), logit, layers, budget, min(recalls))


def _recall(cells: PlanCells, chosen: Tensor, length: int) -> float:
    of_length = cells.lengths == length
    kept = cells.worth[chosen & of_length[cells.plan]].sum() + cells.tail_worth[of_length].sum()
    return float(kept / cells.pairs[of_length].sum().clamp(min=1))


def _figures(cells: PlanCells, chosen: Tensor, length: int) -> LengthFigures:
    of_length = cells.lengths == length
    mine = of_length[cells.plan]
    plans = int(of_length.sum())
    taken = chosen & mine
    recall = _recall(cells, chosen, length)
    per_plan = torch.bincount(cells.plan[taken], minlength=cells.num_plans)[of_length].double()
    far = float(cells.worth[mine].sum())
    pairs = cells.pair_recalls(chosen)[of_length[cells.pair_plan]]
    oracle, _ = CellRanking(cells, cells.worth).curve(length, len(cells.worth))
    return LengthFigures(
        length_tokens=length,
        texts=len(cells.texts[of_length].unique()),
        plans=plans,
        evidence_recall=recall,
        evidence_recall_p01=float(pairs.quantile(0.01)) if len(pairs) else 1.0,
        far_recall=float(cells.worth[taken].sum()) / far if far else 1.0,
        precision=float(cells.is_wanted[taken].double().mean()) if bool(taken.any()) else 0.0,
        blocks=float(per_plan.mean()),
        blocks_p99=float(per_plan.quantile(0.99)),
        candidates=float(mine.sum()) / plans,
        oracle_blocks=_first_at_least(oracle, recall) / plans,
    )


def _layer_sets(count: int, config: CalibrationConfig) -> Iterator[tuple[int, ...]]:
    most = min(count, config.most_layers)
    for size in range(min(config.least_layers, most), most + 1):
        yield from combinations(range(count), size)


def _lengths(cells: PlanCells) -> list[int]:
    """Those with evidence to recall."""
    return sorted(set(cells.lengths[cells.pairs > 0].tolist()))


def _first_at_least(curve: Tensor, value: float) -> int:
    """How many must be taken for the (rising) curve to reach a value; one more than there are: never."""
    return int(torch.searchsorted(curve, torch.tensor(value, dtype=curve.dtype) - 1e-12))
