"""The evidence recall that is reported is the one brute force finds, over every key there is."""

import numpy as np
import pytest
import torch

from forepage.kv.evidence import merge_audit
from forepage.kv.ids import BlockIdx
from forepage.rpc import index_pb2
from forepage.settings import ResidencyMode
from forepage_kernels.layout import KeyLayout, KeyPool, load_rows
from rigs.worker import Running, WorkerRig, plan_reply, text_tokens, worker_rig

PROMPT = text_tokens(2_400)
Verdict = tuple[int, int]
"""Evidence entries, and how many of them were resident."""


def all_keys(rig: WorkerRig, running: Running, layer: int) -> np.ndarray:
    """Every key [entries, dims] of one c4 layer, each block from where it lies: arena or device."""
    geometry, sequence = rig.parts.geometry, running.sequence
    layout = KeyLayout(64, geometry.index_dims, "fp8")
    slots = rig.arena.payloads.view(-1, geometry.slot_bytes)
    arena = KeyPool(slots, geometry.keys_offset + layer * geometry.keys_plane_bytes, layout)
    device = KeyPool(rig.parts.blocks.pools.keys, layer * geometry.keys_plane_bytes, layout)
    keys = []
    for block in range(sequence.resident.num_blocks):
        ref = sequence.arena.ref_by_block.get(block)
        pool, at = (arena, int(ref.arena_id)) if ref else (device, sequence.resident.key_id_by_block[block])
        entries = torch.arange(at * 64, at * 64 + 64)
        keys.append(load_rows(pool, entries).numpy())
    return np.concatenate(keys)[: sequence.num_processed // 4]


def brute_force(rig: WorkerRig, running: Running, audit: index_pb2.Audit) -> Verdict:
    """Plain numpy: score everything, softmax over the top-k, count entries of at least 1 %."""
    keys = all_keys(rig, running, audit.layer_idx).astype(np.float64)
    query = np.frombuffer(audit.query, "<f4").reshape(-1, keys.shape[1]).astype(np.float64)
    weights = np.frombuffer(audit.weights, "<f4").astype(np.float64)
    scores = weights @ np.maximum(query @ keys.T, 0.0)
    top = np.argsort(-scores, kind="stable")[: audit.topk]
    masses = np.exp(scores[top] - scores[top].max())
    evidence = top[masses / masses.sum() >= 0.01]
    held = running.sequence.resident.key_id_by_block
    return len(evidence), sum(int(entry) // 64 in held for entry in evidence)


def reported(rig: WorkerRig, running: Running, audit: index_pb2.Audit) -> Verdict:
    """What the worker's own parts say, given the absent blocks' scores."""
    keys = all_keys(rig, running, audit.layer_idx)
    query = np.frombuffer(audit.query, "<f4").reshape(-1, keys.shape[1])
    weights = np.frombuffer(audit.weights, "<f4")
    held = running.sequence.resident.key_id_by_block
    resident = np.frombuffer(audit.resident_scores, "<f4").tolist()
    scores = weights @ np.maximum(query @ keys.T, 0.0)
    absent = [(BlockIdx(e // 64), float(scores[e])) for e in range(len(scores)) if e // 64 not in held]
    bitmap = np.unpackbits(np.frombuffer(audit.resident, np.uint8), bitorder="little")
    assert all(
        bool(bitmap[block]) is (block in held) for block in range(running.sequence.resident.pinned_from)
    )
    verdict = merge_audit(resident, absent, topk=audit.topk)
    return verdict.num_evidence, verdict.num_evidence_resident


def test_what_the_worker_sends_merges_to_the_brute_force_recall() -> None:
    """Resident scores from the step itself, absent ones from the keys: together every evidence entry."""
    compared = []
    with worker_rig(random_audits=4, audit_layers=3) as rig:
        requests: list[Running] = []

        def answer(request: index_pb2.LookaheadRequest) -> index_pb2.LookaheadReply:
            for audit in request.audits:
                wanted = brute_force(rig, requests[0], audit)
                assert reported(rig, requests[0], audit) == wanted
                compared.append(wanted)
            return plan_reply(request, [0, 2])

        rig.index.auto = answer
        requests.append(rig.submit(PROMPT, mode=ResidencyMode.GUARDED, max_tokens=50))
        rig.run(requests[0])
    assert len(compared) >= 12
    assert any(resident < evidence for evidence, resident in compared), "something was missed"
    assert any(resident > 0 for _, resident in compared)


def test_the_workers_own_audit_reports_the_brute_force_recall() -> None:
    """The index is down: the report's mean is that of brute force at the same steps."""
    with worker_rig(random_audits=4, audit_layers=3, on_index_down="tail") as rig:
        rig.index.is_up = False
        running = rig.submit(PROMPT, mode=ResidencyMode.GUARDED, max_tokens=40)
        asked: dict[int, list[Verdict]] = {}
        auditing = rig.loop._auditing
        take = auditing._take

        def spy(sequence, position, verdicts):  # type: ignore[no-untyped-def]
            asked[position] = [(v.num_evidence, v.num_evidence_resident) for v in verdicts]
            take(sequence, position, verdicts)

        auditing._take = spy  # type: ignore[method-assign]
        rig.run(running)
    recalls = [sum(r for _, r in v) / sum(e for e, _ in v) for v in asked.values() if sum(e for e, _ in v)]
    assert running.report.audited_steps == len(asked)
    assert running.report.evidence_recall_mean == pytest.approx(sum(recalls) / len(recalls))
    assert running.report.evidence_recall_min == pytest.approx(min(recalls))
