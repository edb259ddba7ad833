"""Counts what happened to one sequence's evidence and memory: `usage.forepage` of the answer."""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from forepage.kv.evidence import AuditVerdict, RecallEstimate
from forepage.kv.geometry import V4_FLASH, KvGeometry
from forepage.kv.resident_set import ResidentSet
from forepage.rpc import worker_pb2 as pb
from forepage.worker.reads import Reads
from forepage.worker.request import PROTO_OF_MODE, PROTO_OF_SOURCE, Request
from forepage.worker.resident_history import ResidentHistory


@dataclass
class Mean:
    """A running mean; None while empty."""

    total: float = 0.0
    count: int = 0
    largest: float = 0.0
    newest: float | None = None

    def add(self, value: float) -> None:
        """One more value."""
        self.total += value
        self.count += 1
        self.largest = max(self.largest, value)
        self.newest = value

    @property
    def value(self) -> float | None:
        """The mean so far."""
        return self.total / self.count if self.count else None


@dataclass(frozen=True)
class StepView:
    """What a decode step sees of a sequence on the device; `num_resident` counts blocks on their way too."""

    budget: int
    num_chosen: int
    num_pinned: int
    num_resident: int
    rows_complete: bool
    keys_complete: bool
    footprint: float
    c4_footprint: float
    footprint_flash: float
    blocks: frozenset[int]
    """Those it can attend: with complete keys all of them, rows that are absent are pulled."""

    @classmethod
    def of(
        cls,
        resident: ResidentSet,
        geometry: KvGeometry,
        *,
        staging_blocks: int,
        in_flight: int,
        budget: int,
    ) -> "StepView":
        """As it is now; `in_flight` counts blocks being loaded."""
        total = resident.num_blocks
        rows = resident.num_resident + staging_blocks + in_flight
        keys = len(resident.key_id_by_block) + in_flight

        def footprint(sizes: KvGeometry) -> float:
            tokens = total * sizes.block_tokens
            held = sizes.kv_bytes(num_tokens=tokens, row_blocks=rows, key_blocks=keys)
            return held / sizes.kv_bytes(num_tokens=tokens, row_blocks=total, key_blocks=total)

        return cls(
            budget=budget,
            num_chosen=len(resident.chosen),
            num_pinned=resident.num_pinned,
            num_resident=resident.num_resident + in_flight,
            rows_complete=resident.rows_complete,
            keys_complete=resident.keys_complete,
            footprint=footprint(geometry),
            c4_footprint=rows / total,
            footprint_flash=footprint(V4_FLASH),
            blocks=frozenset(range(total) if resident.keys_complete else resident.row_id_by_block),
        )


@dataclass
class Report:
    """Running figures of one sequence; `message` turns them into the answer's report."""

    recall: RecallEstimate = field(default_factory=RecallEstimate)
    layer_recall: Mean = field(default_factory=Mean)
    first_layer_recall: Mean = field(default_factory=Mean)
    """Of every audited layer of a step that had evidence, and the same before any repair for that step: what
    the layers are like that no audit looked at."""
    missed_mass: Mean = field(default_factory=Mean)
    recall_at_k: Mean = field(default_factory=Mean)
    latency_ms: Mean = field(default_factory=Mean)
    commit_steps: Mean = field(default_factory=Mean)
    footprint: Mean = field(default_factory=Mean)
    c4_footprint: Mean = field(default_factory=Mean)
    audited_positions: set[int] = field(default_factory=set)
    audited_layers: int = 0
    audits_partial: int = 0
    audits_lost: int = 0
    worker_audits: int = 0
    repairs: int = 0
    redone_steps: int = 0
    escalations: int = 0
    moves_to_exact: int = 0
    tokens_before_escalation: int = 0
    intervals: int = 0
    late_plans: int = 0
    index_down_intervals: int = 0
    discarded_plans: int = 0
    budget_max: int = 0
    chosen_max: int = 0
    pinned_max: int = 0
    resident_max: int = 0
    demand_bytes: int = 0
    prefetch_bytes: int = 0
    workspace_blocks: int = 0
    full_steps: int = 0
    paged_steps: int = 0
    exact_steps: int = 0
    paused_ms: float = 0.0
    stalled_ms: float = 0.0
    footprint_flash: Mean = field(default_factory=Mean)
    chosen: Mean = field(default_factory=Mean)
    history: ResidentHistory | None = None
    """What each step could attend; None: not asked for."""
    reads: Reads | None = None
    """Which blocks were read; None: not asked for."""

    def add_first_look(self, verdicts: Seq[AuditVerdict]) -> None:
        """An audit of a step that no repair was made for."""
        for recall in _layer_recalls(verdicts):
            self.first_layer_recall.add(recall)

    def add_audit(self, position: int, verdicts: Seq[AuditVerdict]) -> float | None:
        """The audit of a step that gave its token: the step's recall, None when it had no evidence."""
        self.audited_positions.add(position)
        self.audited_layers += len(verdicts)
        for recall in _layer_recalls(verdicts):
            self.layer_recall.add(recall)
        for verdict in verdicts:
            self.missed_mass.add(verdict.missed_mass)
            self.recall_at_k.add(verdict.recall_at_k)
        return self.recall.add_step(
            num_evidence=sum(verdict.num_evidence for verdict in verdicts),
            num_evidence_resident=sum(verdict.num_evidence_resident for verdict in verdicts),
        )

    def add_step(self, view: StepView) -> None:
        """What one decode step had on the device."""
        self.budget_max = max(self.budget_max, view.budget)
        self.chosen_max = max(self.chosen_max, view.num_chosen)
        self.pinned_max = max(self.pinned_max, view.num_pinned)
        self.resident_max = max(self.resident_max, view.num_resident)
        if view.keys_complete:
            self.full_steps += view.rows_complete
            self.exact_steps += not view.rows_complete
        else:
            self.paged_steps += 1
            self.chosen.add(view.num_chosen)
        if self.history is not None:
            self.history.add_step(self.decode_steps, view.blocks, is_paged=not view.keys_complete)
        self.footprint.add(view.footprint)
        self.c4_footprint.add(view.c4_footprint)
        self.footprint_flash.add(view.footprint_flash)

    @property
    def decode_steps(self) -> int:
        """Steps so far."""
        return self.full_steps + self.paged_steps + self.exact_steps

    def recall_estimate(self, num_layers: int) -> float | None:
        """Mean evidence recall of a c4 layer with evidence, over all layers of the audited steps.

        A step that was made again has no miss left in the layers that were looked at, and only there: the
        others count as audited layers were when they were looked at first.
        """
        mean, first = self.layer_recall.value, self.first_layer_recall.value
        if mean is None or first is None:
            return mean
        audited = self.audited_layers / (num_layers * len(self.audited_positions))
        return audited * mean + (1 - audited) * min(mean, first)

    def message(
        self,
        request: Request,
        *,
        final_mode: pb.ResidencyMode,
        full_by_size: bool,
        full_by_room: bool,
        budget: int,
        slack: int,
        num_layers: int,
    ) -> pb.ResidencyReport:
        """The report as it goes over the wire; means without a sample are left unset."""
        report = pb.ResidencyReport(
            mode_requested=PROTO_OF_MODE[request.mode],
            mode_final=final_mode,
            full_by_size=full_by_size,
            full_by_room=full_by_room,
            audited_steps=len(self.audited_positions),
            audited_layers=self.audited_layers,
            decode_steps=self.decode_steps,
            audited_share=len(self.audited_positions) / self.paged_steps if self.paged_steps else 0.0,
            audits_without_evidence=self.recall.num_without_evidence,
            audits_partial=self.audits_partial,
            audits_lost=self.audits_lost,
            worker_audits=self.worker_audits,
            repairs=self.repairs,
            redone_steps=self.redone_steps,
            escalations=self.escalations,
            moves_to_exact=self.moves_to_exact,
            tokens_before_escalation=self.tokens_before_escalation,
            intervals=self.intervals,
            late_plans=self.late_plans,
            index_down_intervals=self.index_down_intervals,
            discarded_plans=self.discarded_plans,
            budget_blocks=budget,
            chosen_blocks_max=self.chosen_max,
            always_resident_blocks_max=self.pinned_max,
            resident_blocks_max=self.resident_max,
            load_slack_blocks=slack,
            demand_bytes=self.demand_bytes,
            prefetch_bytes=self.prefetch_bytes,
            kv_footprint=self.footprint.value or 0.0,
            c4_footprint=self.c4_footprint.value or 0.0,
            prefill_workspace_blocks=self.workspace_blocks,
            full_steps=self.full_steps,
            paged_steps=self.paged_steps,
            exact_steps=self.exact_steps,
            paused_ms=int(self.paused_ms),
            stalled_ms=int(self.stalled_ms),
            plan_source=PROTO_OF_SOURCE[request.plan_source],
            footprint_flash=self.footprint_flash.value or 0.0,
            chosen_blocks_mean=self.chosen.value or 0.0,
            evidence_recall_steps=self.recall.steps if request.audit else (),
            resumed_tokens=request.num_answered,
        )
        for name, value in (
            ("evidence_recall_mean", self.recall.mean),
            ("evidence_recall_first_mean", self.first_layer_recall.value),
            ("evidence_recall_estimate", self.recall_estimate(num_layers)),
            ("evidence_recall_min", self.recall.minimum),
            ("evidence_recall_low95", self.recall.low95),
            ("missed_mass_mean", self.missed_mass.value),
            ("recall_at_k_mean", self.recall_at_k.value),
            ("prefetch_latency_ms_mean", self.latency_ms.value),
            ("prefetch_latency_ms_max", self.latency_ms.largest if self.latency_ms.count else None),
            ("commit_steps_mean", self.commit_steps.value),
            ("commit_steps_max", int(self.commit_steps.largest) if self.commit_steps.count else None),
        ):
            if value is not None:
                setattr(report, name, value)
        if self.history is not None:
            self.history.write(report)
        if self.reads is not None:
            for block_idx, mass in self.reads.mean_mass():
                report.read_block_idx.append(block_idx)
                report.read_mass.append(mass)
        return report


def _layer_recalls(verdicts: Seq[AuditVerdict]) -> Iterator[float]:
    return (recall for verdict in verdicts if (recall := verdict.evidence_recall) is not None)
