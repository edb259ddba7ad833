"""What an audit saw before anything was repaired, and what it says of the layers that none looked at."""

import pytest

from forepage.kv.evidence import AuditVerdict
from forepage.settings import ResidencyMode
from forepage.worker.device_audit import StepAudit
from forepage.worker.report import Report
from forepage.worker.sequence import Sequence
from rigs.worker import text_tokens, wants, worker_rig

PROMPT = text_tokens(2_400)


def seen(*layers: tuple[int, int]) -> list[AuditVerdict]:
    """By layer: evidence entries, and how many of them were resident."""
    return [AuditVerdict(evidence, resident, 0.1, 0.9, ()) for evidence, resident in layers]


def test_the_estimate_counts_layers_that_no_audit_looked_at_as_found_before_repair() -> None:
    """Two of eight layers are audited; the second step missed evidence, and was made again with it."""
    report = Report()
    for position, first, given in (
        (10, seen((4, 4), (0, 0)), seen((4, 4), (0, 0))),
        (11, seen((2, 1), (4, 1)), seen((2, 2), (4, 4))),
    ):
        report.add_first_look(first)
        report.add_audit(position, given)
    assert report.recall.mean == 1.0
    found_first = (1.0 + 0.5 + 0.25) / 3
    assert report.recall_estimate(8) == pytest.approx(1.0 * 2 / 8 + found_first * 6 / 8)
    assert report.recall_estimate(2) == 1.0, "nothing was left out"
    assert Report().recall_estimate(8) is None


def test_a_sequence_that_repairs_nothing_is_estimated_as_it_was_audited() -> None:
    with worker_rig(
        padded=True, audits_on_device=True, audit_layers=1, random_audits=0, early_audit_steps=64
    ) as rig:
        rig.index.auto = wants(0)
        running = rig.submit(PROMPT, mode=ResidencyMode.LOOKAHEAD, max_tokens=24, budget_blocks=4, audit=True)
        rig.run(running)
    report = running.report
    assert 0.0 < report.evidence_recall_first_mean < 1.0
    assert report.evidence_recall_estimate == pytest.approx(report.evidence_recall_mean)


def test_repeats_are_no_first_looks() -> None:
    with worker_rig(
        padded=True, audits_on_device=True, audit_layers=3, random_audits=0, early_audit_steps=64
    ) as rig:
        rig.index.auto = wants(0)
        running = rig.submit(PROMPT, mode=ResidencyMode.GUARDED, max_tokens=24, budget_blocks=7)
        rig.run(running)
    report = running.sequence.report
    assert report.redone_steps > 0
    assert report.first_layer_recall.count > 0
    assert (report.first_layer_recall.value or 0.0) < (report.layer_recall.value or 1.0)


@pytest.mark.parametrize("num_tokens", [2_400, 2_550], ids=["inside a block", "over a block's end"])
def test_a_held_step_repeats_its_position_and_leaves_the_same_state(num_tokens: int) -> None:
    """A step writes again what it wrote and takes no second block: made twice, the answer is that of once."""
    prompt = text_tokens(num_tokens)
    with worker_rig(
        padded=True, audits_on_device=True, audit_layers=3, random_audits=0, early_audit_steps=64
    ) as rig:
        rig.index.auto = wants(*range(8))
        once = rig.submit(prompt, mode=ResidencyMode.LOOKAHEAD, max_tokens=20, budget_blocks=7, name="once")
        rig.run(once)
        lookahead, seen = rig.loop._lookahead, set[int]()

        def redo_each_once(_: Sequence, audit: StepAudit, **_held: bool) -> bool:
            is_new = audit.position not in seen
            seen.add(audit.position)
            return is_new

        lookahead.must_redo = redo_each_once  # type: ignore[method-assign, assignment]
        twice = rig.submit(prompt, mode=ResidencyMode.GUARDED, max_tokens=20, budget_blocks=7, name="twice")
        rig.run(twice)
    assert twice.tokens == once.tokens
    assert len(seen) >= 10
