"""What a plan should have, by every rule, against loops over the golden entries."""

from dataclasses import replace

import pytest
import torch

from forepage.training.indexer.config import Granularity, LabelConfig, LabelRule
from forepage.training.indexer.features import Features, TextId
from forepage.training.indexer.golden import golden_entries
from forepage.training.indexer.wanted import (
    is_first,
    possible_plans,
    served_plans,
    wanted_entries,
    wanted_mass,
)

LAYERS = 3
ENTRIES = 64 * 8
ANSWERS = (0,) * 20 + (1,) * 3 + (2,) + (3,) * 9
INTERVAL, RECENT = 8, 1024
BEGIN = 1500
LABEL = LabelConfig(LabelRule.UNION, Granularity.ENTRY, mass=0.5, min_layers=2)


def features() -> Features:
    """33 rows in four answers, one of a single row; selections of 12 entries at three layers."""
    draw = torch.Generator().manual_seed(8)
    rows = len(ANSWERS)
    selected = torch.stack(
        [torch.randperm(80, generator=draw)[:12].sort().values * 6 for _ in range(rows * LAYERS)]
    )
    scores = torch.randn(rows * LAYERS, 12, generator=draw) * 3
    return Features(
        text=TextId("mrcr", 2048, 1, False),
        num_entries=ENTRIES,
        positions=torch.arange(BEGIN, BEGIN + rows, dtype=torch.int32),
        answers=torch.tensor(ANSWERS, dtype=torch.int32),
        hidden=torch.zeros(rows, 1, 4, dtype=torch.bfloat16),
        keys=torch.zeros(1, 8, 16, dtype=torch.uint8),
        golden=golden_entries(selected, scores, mass=0.6),
    )


def golden_lists(text: Features) -> list[list[list[tuple[int, float]]]]:
    """[row][layer] -> (entry, mass) by falling mass."""
    pairs = list(zip(text.golden.entries.tolist(), text.golden.masses.tolist(), strict=True))
    lists, start = [], 0
    for count in text.golden.counts.tolist():
        lists.append(pairs[start : start + count])
        start += count
    return [lists[row : row + LAYERS] for row in range(0, len(lists), LAYERS)]


def mass_set(pairs: list[tuple[int, float]], mass: float) -> dict[int, float]:
    kept, before = {}, 0.0
    for entry, share in pairs:
        if before < mass - 1e-7:
            kept[entry] = share
        before += share
    return kept


def step_wants(layers: list[list[tuple[int, float]]], rule: LabelRule, layer: int | None) -> dict[int, float]:
    """Entry -> mass of one row."""
    sets = [
        {entry: share for entry, share in pairs if share >= 0.01}
        if rule in (LabelRule.EVIDENCE, LabelRule.OWN_LAYER)
        else mass_set(pairs, LABEL.mass)
        for pairs in layers
    ]
    if layer is not None:
        sets = [sets[layer]]
    wants: dict[int, float] = {}
    for entry in {entry for one in sets for entry in one}:
        masses = [one[entry] for one in sets if entry in one]
        if rule is not LabelRule.VOTE or len(masses) >= LABEL.min_layers:
            wants[entry] = sum(masses)
    return wants


@pytest.mark.parametrize("rule", list(LabelRule))
def test_wanted_mass_is_the_sum_over_the_steps_served(rule: LabelRule) -> None:
    text = features()
    plans = possible_plans(text, interval=INTERVAL, recent_tokens=RECENT)
    layer = 1 if rule is LabelRule.OWN_LAYER else None
    found = wanted_mass(wanted_entries(text, replace(LABEL, rule=rule), LAYERS), plans, ENTRIES, layer)
    lists = golden_lists(text)
    for plan, row in enumerate(plans.rows.tolist()):
        wanted = torch.zeros(ENTRIES)
        for served in range(row + 1, min(row + 1 + INTERVAL, len(ANSWERS))):
            if ANSWERS[served] != ANSWERS[row]:
                break
            for entry, mass in step_wants(lists[served], rule, layer).items():
                if entry < int(plans.candidates[plan]) * 64:
                    wanted[entry] += mass
        torch.testing.assert_close(found[plan], wanted, rtol=1e-5, atol=1e-6)


def test_plans_are_rows_with_steps_to_serve_and_blocks_to_choose() -> None:
    text = features()
    plans = possible_plans(text, interval=INTERVAL, recent_tokens=RECENT)
    last_rows = {19, 22, 23, 32}
    assert plans.rows.tolist() == [row for row in range(33) if row not in last_rows]
    assert plans.candidates.tolist() == [(BEGIN + row + 1 - RECENT) // 256 for row in plans.rows.tolist()]
    assert len(possible_plans(text, interval=INTERVAL, recent_tokens=BEGIN + 40)) == 0


def test_serving_plans_at_a_questions_end_and_every_interval() -> None:
    text = features()
    plans = possible_plans(text, interval=INTERVAL, recent_tokens=RECENT)
    assert served_plans(text, plans, INTERVAL).rows.tolist() == [0, 8, 16, 20, 24]
    assert plans.rows[is_first(text, plans)].tolist() == [0, 20, 24]


def test_a_plan_with_nothing_to_want_gets_no_positive() -> None:
    # The released sampler made a random entry the positive here.
    text = features()
    nothing = replace(
        text,
        golden=golden_entries(
            torch.full((len(ANSWERS) * LAYERS, 1), ENTRIES - 1),
            torch.zeros(len(ANSWERS) * LAYERS, 1),
            mass=0.6,
        ),
    )
    plans = possible_plans(nothing, interval=INTERVAL, recent_tokens=RECENT)
    mass = wanted_mass(wanted_entries(nothing, LABEL, LAYERS), plans, ENTRIES)
    assert len(plans) > 0
    assert float(mass.sum()) == 0.0
