"""Audits of one worker's sequences: what an audited step means for the report and for the guard.

A GPU makes its own audits (device_audit.py); for other workers the index makes them, and while it is down
the worker's CPU, from the same arena. In `exact` nothing is ever missed, so the audit asks what paging
would have missed: that decides when to step back.
"""

from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from forepage.kv.evidence import AuditVerdict, merge_audit
from forepage.kv.geometry import BLOCK_ENTRIES
from forepage.kv.guard import GuardAction
from forepage.kv.ids import BlockIdx
from forepage.model.indexer import IndexerTap
from forepage.model.kv_pools import key_layout
from forepage.rpc import index_pb2 as pb
from forepage.settings import ResidencyMode
from forepage.telemetry import MetricName
from forepage.worker.device_audit import StepAudit
from forepage.worker.parts import WorkerParts
from forepage.worker.quota import grow_promise
from forepage.worker.sequence import Sequence, StepTap
from forepage_kernels.layout import KeyPool
from forepage_kernels.native_indexer import native_indexer
from forepage_kernels.select_topk import select_topk


class Auditing:
    """Turns audits into the sequence's report and the guard's actions."""

    def __init__(self, parts: WorkerParts, arena: Tensor) -> None:
        """`arena` is the payload area as u8, for audits the worker makes itself."""
        self._parts = parts
        self._arena = arena

    def take_results(self, sequence: Sequence, results: Seq[pb.AuditResult]) -> None:
        """The index's answers about one or more audited steps."""
        by_position: dict[int, list[pb.AuditResult]] = defaultdict(list)
        for result in results:
            if result.num_unread:
                sequence.report.audits_partial += 1
            by_position[result.position].append(result)
        for position, layers in by_position.items():
            verdicts = [
                AuditVerdict(
                    num_evidence=layer.num_evidence,
                    num_evidence_resident=layer.num_evidence_resident,
                    missed_mass=layer.missed_mass,
                    recall_at_k=layer.recall_at_k,
                    missing=tuple(
                        (BlockIdx(idx), mass)
                        for idx, mass in zip(layer.missing_block_idx, layer.missing_mass, strict=True)
                    ),
                )
                for layer in layers
            ]
            self._take_first(sequence, position, verdicts)

    def take_audit(self, sequence: Sequence, audit: StepAudit, *, is_held: bool, is_repeat: bool) -> bool:
        """What the device found about a step (`is_repeat`: made again); whether it must be made again.

        Of a step whose token is still held back, a miss is repaired first; then the step counts for nothing.
        """
        recall = _recall(audit.verdicts)
        if not is_repeat:
            sequence.report.add_first_look(audit.verdicts)
        if is_held and recall is not None and self._guard(sequence, audit.position, recall, audit.verdicts):
            sequence.lookahead.missed = frozenset(idx for idx, _ in _missing(audit.verdicts))
            sequence.lookahead.is_redone = True
            sequence.report.redone_steps += 1
            self._parts.telemetry.count(MetricName.REDONE_STEPS)
            return True
        report = sequence.report
        report.worker_audits += 1
        report.audits_partial += audit.num_unread > 0
        self._take(sequence, audit.position, audit.verdicts)
        return False

    def audit_here(self, sequence: Sequence, tap: StepTap, layers: Seq[int], num_blocks: int) -> None:
        """The index is down: score the absent blocks on the worker. Slower, and counted."""
        absent = [idx for idx in range(num_blocks) if idx not in sequence.resident.key_id_by_block]
        verdicts = [self._score_absent(sequence, tap, layer, absent) for layer in layers]
        sequence.report.worker_audits += 1
        self._parts.telemetry.count(MetricName.FALLBACKS, fallback="worker_audit")
        self._take_first(sequence, sequence.num_processed - 1, verdicts)

    def shadow(self, sequence: Sequence, tap: StepTap, layers: Seq[int]) -> None:
        """In `exact`: what of this step's selection was absent as rows, and so would have been missed."""
        for layer in layers:
            verdict = _shadow_verdict(sequence, tap.indexer[layer], tap.row, self._parts.topk)
            recall = verdict.evidence_recall
            if recall is not None:
                sequence.guard, _ = sequence.guard.on_audit(recall)

    def _take_first(self, sequence: Sequence, position: int, verdicts: Seq[AuditVerdict]) -> None:
        """Of a step that is not made again."""
        sequence.report.add_first_look(verdicts)
        self._take(sequence, position, verdicts)

    def _take(self, sequence: Sequence, position: int, verdicts: Seq[AuditVerdict]) -> None:
        telemetry = self._parts.telemetry
        sequence.lookahead.missed = frozenset(idx for idx, _ in _missing(verdicts))
        recall = sequence.report.add_audit(position, verdicts)
        for verdict in verdicts:
            telemetry.record(MetricName.MISSED_MASS, verdict.missed_mass)
        if recall is None:
            return
        telemetry.record(MetricName.EVIDENCE_RECALL, recall)
        self._guard(sequence, position, recall, verdicts)

    def _guard(self, sequence: Sequence, position: int, recall: float, verdicts: Seq[AuditVerdict]) -> bool:
        """Let the guard look at an audited step; whether it did something about it."""
        state = sequence.lookahead
        if sequence.request.mode is not ResidencyMode.GUARDED:
            return False
        if sequence.is_exact or state.repair_since is not None or position < state.audits_from:
            return False  # this step did not see the repair that is decided, or the last one
        before = sequence.guard
        missing = _missing(verdicts)
        held = state.repair.keys() | {block_idx for block_idx, _ in missing}
        num_repairs = len(held) if len(held) > len(state.repair) else None
        after, action = before.on_audit(recall, num_repairs=num_repairs)
        if action is GuardAction.NONE:
            return False
        sequence.guard = after
        if action is GuardAction.RAISE_BUDGET and not grow_promise(self._parts, sequence):
            sequence.guard, action = before.to_exact(), GuardAction.MOVE_TO_EXACT
        self.escalate(sequence, action, position, missing)
        return True

    def escalate(
        self,
        sequence: Sequence,
        action: GuardAction,
        position: int,
        missing: Iterable[tuple[BlockIdx, float]] = (),
    ) -> None:
        """Write down what the guard decided; the loop carries it out before the next step."""
        state, report = sequence.lookahead, sequence.report
        state.repair_since = position
        if action is GuardAction.REPAIR:
            report.repairs += 1
        else:
            report.escalations += 1
        if action is not GuardAction.MOVE_TO_EXACT:
            for block_idx, mass in missing:
                state.repair[block_idx] = max(mass, state.repair.get(block_idx, 0.0))
            state.repair_due = True
        else:
            report.moves_to_exact += 1
            state.want_exact = True
        self._parts.telemetry.count(MetricName.ESCALATIONS, reason=action.name.lower())

    def _score_absent(self, sequence: Sequence, tap: StepTap, layer: int, absent: list[int]) -> AuditVerdict:
        """The native indexer over absent blocks' keys in the arena, merged with the resident scores.

        `absent` ascends. A block whose keys are damaged (a score that is not finite) makes the audit partial.
        """
        geometry, indexer = self._parts.geometry, tap.indexer[layer]
        resident = _pairs(*indexer.chosen(tap.row))
        if not absent:
            return merge_audit(resident, (), topk=self._parts.topk)
        slots = self._arena[: self._arena.numel() // geometry.slot_bytes * geometry.slot_bytes]
        pool = KeyPool(
            slots.view(-1, geometry.slot_bytes),
            geometry.keys_offset + layer * geometry.keys_plane_bytes,
            key_layout(geometry),
        )
        ids = [sequence.arena.ref_by_block[idx].arena_id for idx in absent]
        scores = native_indexer(
            indexer.query[tap.row : tap.row + 1].float().cpu(),
            indexer.weights[tap.row : tap.row + 1].float().cpu(),
            pool,
            block_table=torch.tensor([ids], dtype=torch.int32),
            visible=torch.tensor([len(absent) * BLOCK_ENTRIES]),
        )[0]
        is_read = scores.view(-1, BLOCK_ENTRIES).isfinite().all(dim=1)
        sequence.report.audits_partial += int(not is_read.all())
        scores.view(-1, BLOCK_ENTRIES)[~is_read] = -torch.inf
        best = select_topk(scores.unsqueeze(0), min(self._parts.topk, scores.numel()))[0]
        best = best[best >= 0]  # ascending here is ascending in the sequence: ties went to the lower entry
        entries = torch.tensor(absent)[best // BLOCK_ENTRIES] * BLOCK_ENTRIES + best % BLOCK_ENTRIES
        return merge_audit(resident, _pairs(entries, scores[best]), topk=self._parts.topk)


def _shadow_verdict(sequence: Sequence, tap: IndexerTap, row: int, topk: int) -> AuditVerdict:
    rows = sequence.resident.row_id_by_block
    resident: list[tuple[int, float]] = []
    absent: list[tuple[int, float]] = []
    for entry, score in _pairs(*tap.chosen(row)):
        is_resident = BlockIdx(entry // BLOCK_ENTRIES) in rows
        (resident if is_resident else absent).append((entry, score))
    return merge_audit(resident, absent, topk=topk)


def _recall(verdicts: Seq[AuditVerdict]) -> float | None:
    """Of one step, its layers' counts summed; None when it had no evidence."""
    num_evidence = sum(v.num_evidence for v in verdicts)
    return sum(v.num_evidence_resident for v in verdicts) / num_evidence if num_evidence else None


def _pairs(entries: Tensor, scores: Tensor) -> list[tuple[int, float]]:
    return list(zip(entries.tolist(), scores.tolist(), strict=True))


def _missing(verdicts: Seq[AuditVerdict]) -> list[tuple[BlockIdx, float]]:
    return [pair for verdict in verdicts for pair in verdict.missing]
