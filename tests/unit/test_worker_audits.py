"""The evidence recall that is reported is the one brute force finds, over every key there is."""

from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from forepage.index.question import QuestionLimits, parse_request
from forepage.kv.evidence import merge_audit
from forepage.kv.ids import BlockIdx
from forepage.model.kv_pools import NAN_BYTE
from forepage.rpc import index_pb2
from forepage.settings import SEEDED_MODEL, ModelSettings, ResidencyMode
from forepage.worker.assembly import ModelFolder
from forepage.worker.device_audit import StepAudit, merge_verdicts
from forepage.worker.questions import audit_messages
from forepage.worker.sequence import Sequence, StepTap
from forepage_kernels.select_topk import select_topk
from rigs.brute_force import Verdict, all_scores, brute_force
from rigs.worker import Running, WorkerRig, plan_reply, text_tokens, wants, worker_rig

PROMPT = text_tokens(2_400)


def reported(rig: WorkerRig, running: Running, audit: index_pb2.Audit) -> Verdict:
    """What the worker's message merges to, given the absent entries' scores."""
    held = running.sequence.resident.key_id_by_block
    entries = np.frombuffer(audit.resident_entries, "<u4").tolist()
    resident = list(zip(entries, np.frombuffer(audit.resident_scores, "<f4").tolist(), strict=True))
    scores = all_scores(rig, running, audit)
    absent = [(e, float(scores[e])) for e in range(len(scores)) if e // 64 not in held]
    bitmap = np.unpackbits(np.frombuffer(audit.resident, np.uint8), bitorder="little")
    assert all(
        bool(bitmap[block]) is (block in held) for block in range(running.sequence.resident.pinned_from)
    )
    verdict = merge_audit(resident, absent, topk=audit.topk)
    return verdict.num_evidence, verdict.num_evidence_resident


def audit_limits(rig: WorkerRig) -> QuestionLimits:
    """What an index of this model accepts."""
    folder = ModelFolder.read(ModelSettings(path=SEEDED_MODEL))
    return QuestionLimits.of_model(folder.spec, rig.parts.geometry, num_target_layers=3, threshold=0.0)


def is_tied(rig: WorkerRig, running: Running, audit: index_pb2.Audit) -> bool:
    """Whether the last entry of the true top-k scores as the first one after it: entries decide."""
    ranked = np.sort(all_scores(rig, running, audit))[::-1]
    return bool(ranked[audit.topk - 1] == ranked[audit.topk])


def test_what_the_worker_sends_merges_to_the_brute_force_recall() -> None:
    """Resident scores from the step itself, absent ones from the keys: together every evidence entry."""
    compared, tied = [], []
    with worker_rig(random_audits=4, audit_layers=3) as rig:
        requests: list[Running] = []
        limits = audit_limits(rig)

        def answer(request: index_pb2.LookaheadRequest) -> index_pb2.LookaheadReply:
            for audit, parsed in zip(request.audits, parse_request(request, limits).audits, strict=True):
                wanted = brute_force(rig, requests[0], audit)
                assert reported(rig, requests[0], audit) == wanted
                assert len(parsed.resident) == audit.topk
                compared.append(wanted)
                tied.append(is_tied(rig, requests[0], audit))
            return plan_reply(request, [0, 2])

        rig.index.auto = answer
        requests.append(rig.submit(PROMPT, mode=ResidencyMode.GUARDED, max_tokens=50))
        rig.run(requests[0])
    assert len(compared) >= 12
    assert any(resident < evidence for evidence, resident in compared), "something was missed"
    assert any(resident > 0 for _, resident in compared)
    assert any(tied), "a tie at the last place"


def test_the_workers_own_audit_reports_the_brute_force_recall() -> None:
    """The index is down: the report's mean is that of brute force at the same steps."""
    with worker_rig(random_audits=4, audit_layers=3, on_index_down="tail") as rig:
        rig.index.is_up = False
        running = rig.submit(PROMPT, mode=ResidencyMode.GUARDED, max_tokens=40)
        found: list[list[Verdict]] = []
        auditing = rig.loop._auditing
        audit_here = auditing.audit_here

        def spy(sequence: Sequence, tap: StepTap, layers: Seq[int], num_blocks: int) -> None:
            asked = audit_messages(sequence, tap, layers, num_blocks=num_blocks, topk=rig.parts.topk)
            found.append([brute_force(rig, running, audit) for audit in asked])
            audit_here(sequence, tap, layers, num_blocks)

        auditing.audit_here = spy  # type: ignore[method-assign]
        rig.run(running)
    recalls = [sum(r for _, r in step) / sum(e for e, _ in step) for step in found]
    assert running.report.audited_steps == running.report.worker_audits == len(found) > 0
    assert running.report.audits_partial == 0
    assert running.report.evidence_recall_mean == pytest.approx(sum(recalls) / len(recalls))
    assert running.report.evidence_recall_min == pytest.approx(min(recalls))
    assert min(recalls) < 1, "something was missed"


def closed(rig: WorkerRig, running: Running, tap: StepTap, layers: Seq[int], num_blocks: int) -> StepTap:
    """The step as if all heads asked the same with negative weights: about half of all entries score 0."""
    indexer = list(tap.indexer)
    held = running.sequence.resident.key_id_by_block
    for layer in layers:
        one = tap.indexer[layer]
        heads = one.query[tap.row : tap.row + 1, :1].expand(-1, one.query.shape[1], -1).contiguous()
        asked = replace(one, query=heads, weights=-one.weights[tap.row : tap.row + 1].abs())
        indexer[layer] = replace(asked, selected=torch.empty(1, 0), scores=torch.empty(1, 0))
        lone = replace(tap, indexer=indexer, row=0)
        (audit,) = audit_messages(running.sequence, lone, [layer], num_blocks=num_blocks, topk=rig.parts.topk)
        scores = torch.from_numpy(all_scores(rig, running, audit)).float()
        for block in range(-(-len(scores) // 64)):
            if block not in held:
                scores[block * 64 : block * 64 + 64] = -torch.inf
        selected = select_topk(scores.unsqueeze(0), rig.parts.topk)
        indexer[layer] = replace(asked, selected=selected, scores=scores[selected])
    return replace(tap, indexer=indexer, row=0)


def test_the_workers_own_audit_takes_the_lower_of_equal_entries() -> None:
    """More absent entries tie for the top than fit: which of them count is decided by entry alone."""
    compared = 0
    with worker_rig(random_audits=4, audit_layers=3, on_index_down="tail") as rig:
        rig.index.is_up = False
        running = rig.submit(PROMPT, mode=ResidencyMode.GUARDED, max_tokens=40)
        auditing = rig.loop._auditing

        def spy(sequence: Sequence, tap: StepTap, layers: Seq[int], num_blocks: int) -> None:
            nonlocal compared
            tied = closed(rig, running, tap, layers, num_blocks)
            held = sequence.resident.key_id_by_block
            absent = [idx for idx in range(num_blocks) if idx not in held]
            for layer in layers:
                (audit,) = audit_messages(sequence, tied, [layer], num_blocks=num_blocks, topk=rig.parts.topk)
                assert is_tied(rig, running, audit)
                top = np.argsort(-all_scores(rig, running, audit), kind="stable")[: audit.topk]
                missing = {int(entry) // 64 for entry in top} - set(held)
                verdict = auditing._score_absent(sequence, tied, layer, absent)
                assert (verdict.num_evidence, verdict.num_evidence_resident) == brute_force(
                    rig, running, audit
                )
                assert {block for block, _ in verdict.missing} == missing
                compared += 1

        auditing.audit_here = spy  # type: ignore[method-assign]
        rig.run(running)
    assert compared >= 12


def test_the_workers_own_audit_of_damaged_keys_is_partial() -> None:
    """Keys that are no numbers can't be ranked: the rest is, and the report says that some were not."""
    with worker_rig(random_audits=4, audit_layers=3, on_index_down="tail") as rig:
        rig.index.is_up = False
        running = rig.submit(PROMPT, mode=ResidencyMode.GUARDED, max_tokens=40)
        audit_here = rig.loop._auditing.audit_here

        def spy(sequence: Sequence, tap: StepTap, layers: Seq[int], num_blocks: int) -> None:
            absent = next(idx for idx in range(num_blocks) if idx not in sequence.resident.key_id_by_block)
            payload = rig.arena.payload(sequence.arena.ref_by_block[BlockIdx(absent)])
            start = rig.parts.geometry.keys_offset
            whole = payload[start : start + rig.parts.geometry.keys_bytes].clone()
            payload[start : start + len(whole)] = 0xFF  # NaN
            audit_here(sequence, tap, layers, num_blocks)
            payload[start : start + len(whole)] = whole

        rig.loop._auditing.audit_here = spy  # type: ignore[method-assign]
        rig.run(running)
    assert running.report.audits_partial == running.report.audited_layers > 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_devices_own_audit_reports_the_brute_force_recall(device: str) -> None:
    """Right behind the step, from the tables and the arena: the same counts, and no question to the index."""
    with worker_rig(
        device_name=device, padded=True, audits_on_device=True, random_audits=4, audit_layers=3
    ) as rig:
        asked: list[index_pb2.LookaheadRequest] = []

        def answer(request: index_pb2.LookaheadRequest) -> index_pb2.LookaheadReply:
            asked.append(request)
            return plan_reply(request, [0, 2])

        rig.index.auto = answer
        running = rig.submit(PROMPT, mode=ResidencyMode.LOOKAHEAD, max_tokens=50, audit=True, reads=True)
        found, wanted = [], []
        auditing = rig.loop._auditing
        after_step, take_audit = rig.loop._lookahead.after_step, auditing.take_audit

        def look(sequence: Sequence, tap: StepTap) -> None:
            if tap.audit is not None:
                layers, blocks = tap.audit.layers, sequence.resident.pinned_from
                audits = audit_messages(sequence, tap, layers, num_blocks=blocks, topk=rig.parts.topk)
                wanted.append([brute_force(rig, running, audit) for audit in audits])
            after_step(sequence, tap)

        def take(sequence: Sequence, audit: StepAudit, *, is_held: bool, is_repeat: bool) -> bool:
            found.append([(v.num_evidence, v.num_evidence_resident) for v in audit.verdicts])
            return take_audit(sequence, audit, is_held=is_held, is_repeat=is_repeat)

        rig.loop._lookahead.after_step = look  # type: ignore[method-assign]
        auditing.take_audit = take  # type: ignore[method-assign]
        rig.run(running)
    assert found == wanted
    assert len(found) >= 8
    assert any(resident < evidence for step in wanted for evidence, resident in step), "something was missed"
    assert running.report.worker_audits == len(found)
    assert not any(request.audits for request in asked)


def test_the_host_is_told_no_more_of_an_audited_step_than_its_audit() -> None:
    """But at a boundary, where the index is asked. All of a step are audited in the same layers."""
    with worker_rig(padded=True, audits_on_device=True, random_audits=15, early_audit_steps=64) as rig:
        rig.index.auto = wants(0)
        taps: list[StepTap] = []
        names: list[str] = []
        after_step = rig.loop._lookahead.after_step

        def look(sequence: Sequence, tap: StepTap) -> None:
            taps.append(tap)
            names.append(sequence.request.request_id)
            after_step(sequence, tap)

        rig.loop._lookahead.after_step = look  # type: ignore[method-assign]
        both = [
            rig.submit(PROMPT, mode=ResidencyMode.LOOKAHEAD, max_tokens=40, audit=True, name=name, salt=name)
            for name in "ab"
        ]
        for running in both:
            rig.run(running)
    audits = [tap.audit for tap in taps if tap.audit is not None]
    told = [tap for tap in taps if tap.hidden is not None]
    assert not any(tap.indexer for tap in taps)
    assert len(audits) > 60
    assert 0 < len(told) < 10
    steps = [
        (tap, after)
        for (tap, first), (after, last) in pairwise(zip(taps, names, strict=True))
        if first < last
    ]
    together = [(tap.audit.layers, after.audit.layers) for tap, after in steps if tap.audit and after.audit]
    assert len(together) > 20
    assert all(layers == others for layers, others in together)
    assert len({audit.layers for audit in audits}) == 3, "of three c4 layers two are looked at in a step"


def test_a_merge_of_many_rows_is_the_merge_of_each() -> None:
    """Ties, signed zeros, padding, rows without an entry: as `merge_audit` ranks them."""
    generator = torch.Generator().manual_seed(0)
    rows, k = 40, 16
    levels = torch.tensor([-torch.inf, -1.0, -0.0, 0.0, 0.5, 3.0, 3.0, 7.0])
    entries = torch.stack([torch.randperm(500, generator=generator)[: 2 * k] for _ in range(rows)])
    scores = levels[torch.randint(0, len(levels), (rows, 2 * k), generator=generator)]
    scores[:3] = -torch.inf
    scores[3, k:] = -torch.inf
    resident, absent = (entries[:, :k], scores[:, :k]), (entries[:, k:], scores[:, k:])
    merged = merge_verdicts(resident, absent, topk=k, num_unread=torch.zeros(rows, dtype=torch.int64))
    for row in range(rows):
        sides = [
            list(zip(side[0][row].tolist(), side[1][row].tolist(), strict=True))
            for side in (resident, absent)
        ]
        wanted = merge_audit(*sides, topk=k)
        assert merged.counts[row].tolist() == [wanted.num_evidence, wanted.num_evidence_resident, 0]
        assert merged.shares[row].tolist() == pytest.approx([wanted.missed_mass, wanted.recall_at_k])
        by_block: dict[int, float] = {}
        for entry, mass in zip(merged.missing[row].tolist(), merged.masses[row].tolist(), strict=True):
            if entry >= 0:
                by_block[entry // 64] = by_block.get(entry // 64, 0.0) + mass
        assert by_block == pytest.approx(dict(wanted.missing))


def test_damaged_keys_make_the_devices_audit_partial() -> None:
    """A key without a score is called neither resident nor absent: the report says what was not looked at."""
    with worker_rig(padded=True, audits_on_device=True, random_audits=4, audit_layers=3) as rig:
        rig.index.auto = wants(0)
        running = rig.submit(PROMPT, mode=ResidencyMode.LOOKAHEAD, max_tokens=24, audit=True)
        rig.run_until(lambda: len(running.tokens) >= 2)
        ref = running.sequence.arena.ref_by_block[2]
        start = rig.arena.offset(ref) + rig.parts.geometry.keys_offset
        rig.arena.payloads[start : start + rig.parts.geometry.keys_plane_bytes].fill_(NAN_BYTE)
        rig.run(running)
    assert running.report.audits_partial > 0
    assert running.report.audited_steps > 0


def test_the_first_steps_of_an_answer_are_audited_densely() -> None:
    """Every fourth one, the first included: an answer that ends before the second plan has been looked at."""
    with worker_rig(
        padded=True,
        audits_on_device=True,
        random_audits=0,
        interval_steps=64,
        early_audit_steps=64,
        early_audit_every_steps=4,
    ) as rig:
        rig.index.auto = wants(0)
        running = rig.submit(PROMPT, mode=ResidencyMode.LOOKAHEAD, max_tokens=30, audit=True)
        rig.run(running)
    assert sorted(running.sequence.report.audited_positions) == [
        len(PROMPT) - 1 + step for step in (1, 5, 9, 13, 17, 21, 25, 29)
    ]


def test_a_step_that_missed_evidence_gives_no_token_until_it_is_there() -> None:
    """Guarded, from the first step on: every token comes from a step whose audit held."""
    with worker_rig(
        padded=True, audits_on_device=True, audit_layers=3, random_audits=0, early_audit_steps=64
    ) as rig:
        rig.index.auto = wants(0)
        full = rig.submit(PROMPT, mode=ResidencyMode.FULL, max_tokens=24, name="full")
        rig.run(full)
        running = rig.submit(PROMPT, mode=ResidencyMode.GUARDED, max_tokens=24, budget_blocks=4)
        rig.run(running)
        rig.check_baseline()
    report = running.report
    assert report.redone_steps > 0
    assert report.repairs + report.escalations == report.redone_steps
    assert report.decode_steps == 23, "a step that is made again counts once"
    assert report.tokens_before_escalation == 0
    assert running.tokens == full.tokens


def test_an_index_is_not_asked_after_every_early_step() -> None:
    """Where the device makes no audits the first steps are a sample like all others."""
    with worker_rig(
        padded=True, random_audits=2, interval_steps=64, early_audit_steps=64, early_audit_every_steps=1
    ) as rig:
        rig.index.auto = wants(0)
        running = rig.submit(PROMPT, mode=ResidencyMode.LOOKAHEAD, max_tokens=40, audit=True)
        rig.run(running)
    assert sum(bool(question.audits) for question in rig.index.questions) <= 3
