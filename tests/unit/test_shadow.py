"""The second pass over served answers: what it counts, and that it finds what audits find."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from forepage.gateway.residency_usage import residency_usage
from forepage.settings import SEEDED_MODEL, ResidencyMode
from loadtest.shadow.checked import Checked, rows_of
from loadtest.shadow.full_pass import FullPass, Looked
from loadtest.shadow.measures import Measures, measure, resident_sets
from loadtest.shadow.report import markdown, result_of
from rigs.worker import WorkerRig, text_tokens, wants, worker_rig

PROMPT = text_tokens(1_900)


def usage(steps: list[int], sets: list[list[int]]) -> dict[str, Any]:
    return {
        "resident_set_step": steps,
        "resident_set_size": [len(blocks) for blocks in sets],
        "resident_set_block_idx": [block for blocks in sets for block in blocks],
    }


def test_a_set_holds_until_the_next_one() -> None:
    sets = resident_sets(usage([1, 3], [[0, 2], [2]]), 4)
    assert sets == [frozenset({0, 2})] * 2 + [frozenset({2})] * 2


@pytest.mark.parametrize("residency", [{}, usage([2], [[0]])])
def test_an_answer_that_does_not_say_its_sets_is_refused(residency: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="audit"):
        resident_sets(residency, 3)


def test_measures_of_a_step_counted_by_hand() -> None:
    """Two layers; entries 0 and 64 lie in blocks 0 and 1; only block 0 is there."""
    big, small = 10.0, 0.0
    looked = Looked(
        selected=torch.tensor([[[0, 64, -1], [64, 70, 130]]]),
        scores=torch.tensor([[[big, big, -torch.inf], [big, small, small]]]),
        attention=torch.tensor([[[0.5, 0.25, 0.0], [0.125, 0.0, 0.0625]]]),
    )
    found = measure(looked, [frozenset({0})])
    assert found.evidence_recall[0] == pytest.approx(1 / 3)
    assert found.layer_recall == ((0.5, 0.0),)
    assert found.golden_recall == (0.0,)  # entry 64 alone is in both layers' mass sets
    assert found.recall_at_k[0] == pytest.approx(1 / 5)
    assert found.missed_mass[0] == pytest.approx((0.5 + 1.0) / 2)
    assert found.missed_attention[0] == pytest.approx((0.25 + 0.1875) / 2)
    everything = measure(looked, [frozenset({0, 1, 2})])
    assert everything == Measures((1.0,), (1.0,), (1.0,), (0.0,), (0.0,), ((1.0, 1.0),))


def test_a_step_that_selects_nothing_misses_nothing() -> None:
    nothing = Looked(torch.full((1, 2, 3), -1), torch.full((1, 2, 3), -torch.inf), torch.zeros(1, 2, 3))
    assert measure(nothing, [frozenset()]) == Measures((None,), (None,), (1.0,), (0.0,), (0.0,), ((),))


@pytest.fixture(scope="module")
def full_pass() -> FullPass:
    return FullPass(SEEDED_MODEL, device="cpu", max_tokens=4_096)


def asked(rig: WorkerRig, mode: ResidencyMode) -> tuple[list[int], dict[str, Any]]:
    running = rig.submit(PROMPT, mode=mode, max_tokens=12, audit=True, salt=mode)
    rig.run(running)
    residency: dict[str, Any] = residency_usage(running.report)
    return running.tokens[: residency["decode_steps"]], residency


@pytest.mark.parametrize("mode", [ResidencyMode.FULL, ResidencyMode.EXACT])
def test_nothing_is_missed_where_everything_is_attended(full_pass: FullPass, mode: ResidencyMode) -> None:
    with worker_rig() as rig:
        rig.index.auto = wants(1)
        answer, residency = asked(rig, mode)
    found = measure(full_pass.look(PROMPT, answer), resident_sets(residency, len(answer)))
    assert set(found.evidence_recall) <= {1.0, None}
    assert set(found.recall_at_k) == {1.0}
    assert max(found.missed_attention) == 0.0


def test_the_pass_finds_what_audits_of_every_layer_and_step_find(full_pass: FullPass) -> None:
    """Not to the last bit: the served step's own layers attended less than the pass's."""
    options: dict[str, Any] = {"early_audit_steps": 64, "audit_layers": 3, "weight_dtype": "fp32"}
    with worker_rig(padded=True, audits_on_device=True, **options) as rig:
        rig.index.auto = wants(1)
        answer, residency = asked(rig, ResidencyMode.LOOKAHEAD)
    assert residency["audited_steps"] == residency["decode_steps"] == residency["paged_steps"]
    found = measure(full_pass.look(PROMPT, answer), resident_sets(residency, len(answer)))
    recalls = [value for value in found.evidence_recall if value is not None]
    assert 0.0 < np.mean(recalls) < 1.0
    assert np.mean(recalls) == pytest.approx(residency["evidence_recall_mean"], abs=0.05)
    layers = [recall for step in found.layer_recall for recall in step]
    assert np.mean(layers) == pytest.approx(residency["evidence_recall_estimate"], abs=0.05)
    assert np.mean(found.recall_at_k) == pytest.approx(residency["recall_at_k_mean"], abs=0.05)
    assert np.mean(found.missed_mass) == pytest.approx(residency["missed_mass_mean"], abs=0.05)


def test_answers_to_one_prompt_are_looked_at_alike_in_any_order(full_pass: FullPass) -> None:
    other = text_tokens(600, 5)
    first = full_pass.look(PROMPT, [5, 6, 7])
    full_pass.look(PROMPT, [9] * 20)
    full_pass.look(other, [1])
    again = full_pass.look(PROMPT, [5, 6, 7])
    assert torch.equal(first.selected, again.selected)
    assert torch.equal(first.scores, again.scores)
    assert torch.equal(first.attention, again.attention)


def test_a_row_sums_up_its_answers_and_says_what_could_not_be_checked() -> None:
    found = Measures((1.0, None), (0.5, None), (0.2, 0.4), (0.1, 0.3), (0.0, 0.1), ((1.0,), ()))
    residency = {"evidence_recall_estimate": 0.9, "evidence_recall_mean": 1.0, "audited_share": 0.5}
    good = Checked("suite", 8192, "guarded", residency, found)
    bad = replace(good, found=None, why_not="no answer: 500")
    (row,) = rows_of([good, bad])
    assert (row["n"], row["not_checked"], row["steps"]) == (1, 1, 2)
    assert row["evidence_recall"] == 1.0
    assert row["largest_difference"] == pytest.approx(0.1)
    assert row["missed_mass"] == pytest.approx(0.2)
    result = result_of([good, bad], command="command", device={}, config={})
    assert "500" in result["why"]["not_checked"]
    assert "guarded" in markdown(result)
