"""Calibration on constructed cells whose right answer is known."""

import pytest
import torch

from forepage.errors import RequestError
from forepage.training.indexer.calibration import (
    calibrate,
    recall_at_budget,
    share_for_recall,
)
from forepage.training.indexer.config import CalibrationConfig
from forepage.training.indexer.saved import table
from forepage.training.indexer.validation import PlanCells

BLOCKS, PLANS = 10, 8


def cells(logits: torch.Tensor, needed: list[int], *, lengths: list[int] | None = None) -> PlanCells:
    """Plans of 10 candidate blocks; each serves one pair per needed block, with one evidence entry in it."""
    plan = torch.arange(PLANS).repeat_interleave(BLOCKS)
    block = torch.arange(BLOCKS).repeat(PLANS)
    is_wanted = torch.isin(block, torch.tensor(needed))
    item_cell = is_wanted.nonzero().squeeze(1)
    count = len(needed)
    return PlanCells(
        logits=logits,
        worth=is_wanted.double(),
        plan=plan,
        is_wanted=is_wanted,
        lengths=torch.tensor(lengths or [4096] * PLANS),
        texts=torch.arange(PLANS) // 2,
        tail_worth=torch.zeros(PLANS, dtype=torch.float64),
        pairs=torch.full((PLANS,), float(count), dtype=torch.float64),
        pair_plan=torch.arange(PLANS).repeat_interleave(count),
        item_pair=torch.arange(PLANS * count),
        item_cell=item_cell,
        pair_size=torch.ones(PLANS * count, dtype=torch.int64),
    )


def scored(order: list[int]) -> torch.Tensor:
    """f32 [cells]: the first block of the order scores 5, the next 4, and so on; alike in every plan."""
    row = torch.empty(BLOCKS)
    row[order] = 5.0 - torch.arange(float(BLOCKS))
    return row.repeat(PLANS)


def config(
    recall: float, budgets: tuple[int, ...] = (16,), layers: tuple[int, int] = (1, 2)
) -> CalibrationConfig:
    return CalibrationConfig(recall, budgets, least_layers=layers[0], most_layers=layers[1])


GOOD = scored([7, 2, 0, 1, 3, 4, 5, 6, 8, 9])
BAD = scored([9, 8, 0, 1, 3, 4, 5, 6, 2, 7])


def test_threshold_takes_just_the_blocks_that_are_needed() -> None:
    found = calibrate(cells(GOOD.unsqueeze(0), [2, 7]), config(1.0))
    low, high = (float(torch.sigmoid(torch.tensor(logit))) for logit in (3.0, 4.0))
    assert low < found.threshold < high
    assert found.reached
    (row,) = found.figures
    assert (row.blocks, row.evidence_recall, row.precision, row.oracle_blocks) == (2.0, 1.0, 1.0, 2.0)


def test_the_table_says_how_few_texts_it_is_from_and_what_chance_would_do() -> None:
    found = calibrate(cells(GOOD.unsqueeze(0), [2, 7]), config(1.0))
    assert found.figures[0].texts == 4
    shown = table(found)
    assert "by construction" in shown
    # 4 texts, 8 plans; all of the far evidence in 2 of 10 blocks, of which chance has 0.2.
    assert "| 4,096 | 4 | 8 | 1.0000 | 1.000 | 1.0000 | 0.2000 | 1.000 | 2.0 (2) | 10.0 | 2.0 |" in shown


def test_a_lower_recall_needs_fewer_blocks() -> None:
    found = calibrate(cells(GOOD.unsqueeze(0), [2, 7]), config(0.5))
    assert found.figures[0].blocks == 1.0
    assert found.figures[0].evidence_recall == 0.5


def test_the_layer_that_knows_is_chosen_and_the_other_is_not() -> None:
    found = calibrate(cells(torch.stack((BAD, GOOD)), [2, 7]), config(1.0))
    assert found.layers == (1,)


def test_two_layers_that_know_a_half_each_are_both_chosen() -> None:
    first = torch.full((BLOCKS,), -9.0)
    second = first.clone()
    first[2], second[7] = 1.0, 1.0
    found = calibrate(cells(torch.stack((first.repeat(PLANS), second.repeat(PLANS))), [2, 7]), config(1.0))
    assert found.layers == (0, 1)
    assert found.figures[0].blocks == 2.0


def test_the_recall_must_hold_at_every_length() -> None:
    logits = GOOD.clone().view(PLANS, BLOCKS)
    logits[4:] -= 3.0  # plans of the longer texts score lower
    lengths = [4096] * 4 + [8192] * 4
    found = calibrate(cells(logits.flatten().unsqueeze(0), [2, 7], lengths=lengths), config(1.0))
    assert found.reached
    assert [row.evidence_recall for row in found.figures] == [1.0, 1.0]
    assert [row.blocks for row in found.figures] == [5.0, 2.0]


def test_a_budget_too_small_is_said_not_to_reach_it() -> None:
    found = calibrate(cells(GOOD.unsqueeze(0), [2, 7]), config(1.0, budgets=(1,)))
    assert not found.reached
    assert found.figures[0].evidence_recall == 0.5


def test_what_is_resident_anyway_counts_as_recalled() -> None:
    made = cells(BAD.unsqueeze(0), [7])
    resident = made.tail_worth + 9.0
    made = PlanCells(**(vars(made) | {"tail_worth": resident, "pairs": made.pairs + 9.0}))
    assert recall_at_budget(made, 0) == {4096: 0.9}
    assert calibrate(made, config(0.9)).figures[0].blocks == 0.0


def test_share_for_recall_counts_blocks_over_all_plans() -> None:
    made = cells(GOOD.unsqueeze(0), [2, 7])
    assert share_for_recall(made, 1.0)[4096] == pytest.approx(0.2)
    assert share_for_recall(made, 1.0, made.worth)[4096] == pytest.approx(0.2)


def test_no_evidence_anywhere_is_refused() -> None:
    made = cells(GOOD.unsqueeze(0), [2])
    empty = PlanCells(**(vars(made) | {"pairs": torch.zeros(PLANS, dtype=torch.float64)}))
    with pytest.raises(RequestError, match="evidence"):
        calibrate(empty, config(0.9))
