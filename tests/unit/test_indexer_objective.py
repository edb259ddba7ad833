"""The losses against their formulas, and which candidates a step learns from."""

import math

import pytest
import torch

from forepage.training.indexer.candidates import choose_candidates
from forepage.training.indexer.objective import focal, mass_divergence


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_focal_is_the_formula_over_the_number_wanted() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, 3.0]])
    wanted = torch.tensor([[True, False, True, False]])
    valid = torch.tensor([[True, True, True, False]])
    total = 0.0
    for logit, is_wanted in ((2.0, True), (-1.0, False), (0.5, True)):
        p = 1 / (1 + math.exp(-logit))
        truth = p if is_wanted else 1 - p
        total += (3.0 if is_wanted else 1.0) * (1 - truth) ** 2 * -math.log(truth)
    found = focal(logits, wanted, valid, gamma=2.0, positive_weight=3.0)
    assert float(found) == pytest.approx(total / 2, rel=1e-5)


def test_mass_divergence_is_0_where_the_softmax_is_the_mass() -> None:
    mass = torch.tensor([[0.5, 0.0, 1.5, 9.0]])
    valid = torch.tensor([[True, True, True, False]])
    logits = torch.tensor([[math.log(1.0), -60.0, math.log(3.0), 50.0]])
    assert float(mass_divergence(logits, mass, valid)) == pytest.approx(0.0, abs=1e-6)
    assert float(mass_divergence(torch.zeros(1, 4), mass, valid)) > 0.1


def test_a_plan_without_mass_has_no_divergence() -> None:
    logits = torch.zeros(1, 3, requires_grad=True)
    loss = mass_divergence(logits, torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool))
    loss.sum().backward()
    assert float(loss.detach()) == 0.0
    assert logits.grad is not None
    assert float(logits.grad.abs().sum()) == 0.0


def test_hard_negatives_are_the_highest_scored_that_a_plan_does_not_want() -> None:
    wanted = torch.zeros(2, 10, dtype=torch.bool)
    wanted[0, 3] = wanted[1, 4] = True
    valid = torch.arange(10).expand(2, -1) < 9
    scores = torch.arange(10.0).expand(2, -1).clone()
    scores[1, 0] = 50.0
    chosen = choose_candidates(wanted, valid, scores, hard=2, random=0, generator=generator())
    # Plan 0: 8 and 7 (9 is no candidate). Plan 1: 0 and 8.
    assert chosen.ids.tolist() == [0, 3, 4, 7, 8]
    assert chosen.num_mined == 3


def test_without_scores_nothing_is_mined_and_random_ones_are_candidates() -> None:
    wanted = torch.zeros(1, 1000, dtype=torch.bool)
    valid = torch.arange(1000).expand(1, -1) < 500
    chosen = choose_candidates(wanted, valid, None, hard=5, random=64, generator=generator())
    assert chosen.num_mined == 0
    assert 10 < len(chosen.ids) <= 64
    assert int(chosen.ids.max()) < 500
    again = choose_candidates(wanted, valid, None, hard=5, random=64, generator=generator())
    assert chosen.ids.tolist() == again.ids.tolist()


def test_more_hard_negatives_than_candidates_takes_what_there_is() -> None:
    wanted = torch.tensor([[True, False, False]])
    valid = torch.tensor([[True, True, False]])
    chosen = choose_candidates(wanted, valid, torch.zeros(1, 3), hard=9, random=0, generator=generator())
    assert chosen.ids.tolist() == [0, 1]
