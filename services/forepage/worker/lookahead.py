"""The lookahead of one worker: asks at boundaries, applies plans between steps, never waits for one.

Owns the questions that are open. A reply of an older boundary or incarnation is discarded and counted;
what can't be asked (index down) falls back to the last set, and says so in the span.
"""

import itertools
import time
from dataclasses import dataclass

from forepage.kv.guard import GuardAction
from forepage.kv.ids import BlockIdx
from forepage.rpc import index_pb2 as pb
from forepage.settings import OnIndexDown, ResidencyMode
from forepage.telemetry import MetricName, SpanName, set_attributes, traceparent_of
from forepage.worker.auditing import Auditing
from forepage.worker.lookahead_state import Outcome, Question
from forepage.worker.parts import WorkerParts
from forepage.worker.questions import (
    audit_messages,
    audited_layers,
    lookahead_request,
    num_candidates,
    predict_message,
    random_audit_steps,
)
from forepage.worker.quota import steady_quota, try_change_promise
from forepage.worker.residency import Residency
from forepage.worker.sequence import Phase, Sequence, StepTap


@dataclass(frozen=True)
class _Asked:
    """An open question on the stream."""

    sequence: Sequence
    question: Question | None
    num_audits: int


class Lookahead:
    """Questions, answers and their consequences for every sequence of a worker."""

    def __init__(self, parts: WorkerParts, auditing: Auditing, residency: Residency) -> None:
        self._parts = parts
        self._auditing = auditing
        self._residency = residency
        self._ids = itertools.count(1)
        self._asked: dict[int, _Asked] = {}

    def ask_first(self, sequence: Sequence, tap: StepTap) -> bool:
        """After prefill: the plan for the first interval. False when the index can't be asked."""
        self._begin_interval(sequence)
        return self._ask(sequence, tap, predict=True, audit=False)

    def after_step(self, sequence: Sequence, tap: StepTap) -> None:
        """After a decode step of this sequence: a boundary, an audit, or nothing."""
        state, settings = sequence.lookahead, self._parts.settings
        step = sequence.report.decode_steps
        is_boundary = step >= state.next_boundary
        if sequence.request.mode is ResidencyMode.FULL or not (is_boundary or step in state.audit_steps):
            return
        audit = sequence.request.mode is ResidencyMode.GUARDED
        if is_boundary:
            if audit and sequence.guard.exact:
                self._auditing.shadow(sequence, tap, self._layers(sequence))
            self._end_of_interval(sequence)
            self._begin_interval(sequence)
        candidates = num_candidates(sequence, settings, self._parts.geometry)
        if sequence.fits_budget(candidates) and sequence.resident.rows_complete:
            return  # nothing is absent, and nothing needs to be
        self._ask(sequence, tap, predict=is_boundary, audit=audit and not sequence.resident.keys_complete)

    def on_reply(self, reply: pb.LookaheadReply) -> Sequence | None:
        """A reply of the index; answers the sequence it was for, if it still wants it."""
        asked = self._asked.pop(reply.request_id, None)
        if asked is None:
            return None
        sequence, question = asked.sequence, asked.question
        if sequence.device is None:
            return None
        if question is not None and sequence.lookahead.question is question:
            question.predict_span.end()
        if reply.error_code:
            self._refused(sequence, question, asked.num_audits, f"{reply.error_code}: {reply.error_message}")
            return sequence
        sequence.report.audits_lost += asked.num_audits - len(reply.audits)
        self._auditing.take_results(sequence, reply.audits)
        if question is None:
            return sequence
        if sequence.lookahead.question is not question or reply.stamp.incarnation != sequence.incarnation:
            self._count_discarded(sequence)
            return sequence
        question.answered_s = time.monotonic()
        phase_ms = (question.answered_s - question.asked_s) * 1e3
        self._parts.telemetry.record(MetricName.PREFETCH_LATENCY, phase_ms, phase="predict")
        sequence.lookahead.desired = [
            (BlockIdx(idx), score) for idx, score in zip(reply.plan.block_idx, reply.plan.score, strict=True)
        ]
        return sequence

    def on_index_down(self) -> None:
        """The stream broke: every open question stays unanswered."""
        for asked in self._asked.values():
            sequence, question = asked.sequence, asked.question
            sequence.report.audits_lost += asked.num_audits
            if question is not None and sequence.lookahead.question is question:
                question.predict_span.end()
                sequence.lookahead.question = None
                self._fall_back(sequence, question)
        self._asked.clear()

    def tick(self, sequence: Sequence) -> None:
        """Between steps: commit what has arrived, start what was decided."""
        state = sequence.lookahead
        if state.load is not None:
            if not state.load.future.done():
                return
            self._residency.finish_load(sequence)
        question = state.question
        if question is not None and question.answered_s is None and not question.late:
            age_ms = (time.monotonic() - question.asked_s) * 1e3
            if age_ms > self._parts.settings.predict_deadline_ms:
                self._count_late(sequence, question)
        if state.load is None and state.want_exact:
            self._try_exact(sequence)
        if state.load is None and sequence.holds.staging_ids and not sequence.is_exact:
            self._residency.leave_exact(sequence)
        if state.load is None and (state.desired is not None or state.repair_due or state.rebalance_due):
            self._residency.start_change(sequence)

    def forget(self, sequence: Sequence) -> None:
        """The sequence ended: its open question ends with it."""
        question = sequence.lookahead.question
        if question is not None:
            question.predict_span.end()
            self._end(question, Outcome.ENDED)
            sequence.lookahead.question = None
        load = sequence.lookahead.load
        if load is not None and load.question is not None:
            self._end(load.question, Outcome.ENDED)

    def _try_exact(self, sequence: Sequence) -> None:
        """Escalation is an allocation: with room the keys are loaded, without it the sequence waits."""
        quota = steady_quota(self._parts, sequence)
        if try_change_promise(self._parts, sequence, quota, use_reserve=True):
            if sequence.paused_since_s is not None:
                sequence.report.paused_ms += (time.monotonic() - sequence.paused_since_s) * 1e3
                sequence.paused_since_s = None
            sequence.phase = Phase.DECODE
            self._residency.start_exact(sequence)
        elif sequence.phase is Phase.DECODE:
            sequence.phase = Phase.PAUSED
            sequence.paused_since_s = time.monotonic()
            self._residency.drop_chosen(sequence)
            self._parts.telemetry.count(MetricName.FALLBACKS, fallback="paused")

    def _begin_interval(self, sequence: Sequence) -> None:
        state, settings = sequence.lookahead, self._parts.settings
        step = sequence.report.decode_steps
        state.interval += 1
        sequence.report.intervals += 1
        phase = (sequence.holds.slot * settings.interval_steps // 8) % settings.interval_steps
        state.next_boundary = step + settings.interval_steps - (phase if state.interval == 0 else 0)
        state.audit_steps = random_audit_steps(sequence, settings, step)

    def _end_of_interval(self, sequence: Sequence) -> None:
        """Close a question that never came to a plan, and let the guard count the interval."""
        state = sequence.lookahead
        question = state.question
        if question is not None and question.answered_s is None:
            if not question.late:
                self._count_late(sequence, question)
            question.predict_span.end()
            self._end(question, Outcome.LATE)
            state.question = None
            state.rebalance_due = True
        if sequence.request.mode is not ResidencyMode.GUARDED:
            return
        sequence.guard, _ = sequence.guard.on_boundary()
        if not sequence.guard.raised:
            state.repair.clear()

    def _ask(self, sequence: Sequence, tap: StepTap, *, predict: bool, audit: bool) -> bool:
        parts = self._parts
        candidates = num_candidates(sequence, parts.settings, parts.geometry)
        if not (predict or audit) or candidates == 0:
            return False
        layers = self._layers(sequence) if audit else []
        question = self._open_question(sequence) if predict else None
        request_id = next(self._ids)
        request = lookahead_request(
            sequence, request_id, num_blocks=candidates, deadline_ms=parts.settings.predict_deadline_ms
        )
        if question is not None:
            request.predict.CopyFrom(predict_message(sequence, tap, num_blocks=candidates))
            request.traceparent = traceparent_of(question.predict_span)
        request.audits.extend(audit_messages(sequence, tap, layers, num_blocks=candidates, topk=parts.topk))
        if parts.index.ask(request):
            sequence.lookahead.question = question or sequence.lookahead.question
            self._asked[request_id] = _Asked(sequence, question, len(layers))
            return True
        if question is not None:
            question.predict_span.end()
            self._fall_back(sequence, question)
        if layers:
            self._auditing.audit_here(sequence, tap, layers, candidates)
        return False

    def _open_question(self, sequence: Sequence) -> Question:
        telemetry, interval = self._parts.telemetry, sequence.lookahead.interval
        span = telemetry.start_span(
            SpanName.INTERVAL,
            sequence.span,
            interval=interval,
            position=sequence.num_processed - 1,
            mode=sequence.mode_now.value,
        )
        return Question(interval, time.monotonic(), span, telemetry.start_span(SpanName.PREDICT, span))

    def _layers(self, sequence: Sequence) -> list[int]:
        return audited_layers(sequence, self._parts.settings, len(self._parts.geometry.c4_layers))

    def _refused(self, sequence: Sequence, question: Question | None, num_audits: int, why: str) -> None:
        sequence.report.audits_lost += num_audits
        self._parts.log.warning("lookahead question refused", why=why, sequence=sequence.request.request_id)
        if question is not None and sequence.lookahead.question is question:
            sequence.lookahead.question = None
            self._fall_back(sequence, question, Outcome.REFUSED)

    def _fall_back(
        self, sequence: Sequence, question: Question, outcome: Outcome = Outcome.INDEX_DOWN
    ) -> None:
        """No prediction this interval: the last set stays, or (if so configured) a move to `exact`."""
        sequence.report.index_down_intervals += 1
        self._parts.telemetry.count(MetricName.FALLBACKS, fallback=outcome.value)
        set_attributes(question.span, fallback=outcome.value)
        self._end(question, outcome)
        sequence.lookahead.rebalance_due = sequence.lookahead.interval > 0
        if self._parts.settings.on_index_down is OnIndexDown.EXACT and sequence.device is not None:
            self._move_to_exact(sequence)

    def _move_to_exact(self, sequence: Sequence) -> None:
        if sequence.request.mode is ResidencyMode.GUARDED and not sequence.guard.exact:
            sequence.guard = sequence.guard.to_exact()
            self._auditing.escalate(sequence, GuardAction.MOVE_TO_EXACT, sequence.num_processed - 1)

    def _count_late(self, sequence: Sequence, question: Question) -> None:
        question.late = True
        sequence.report.late_plans += 1
        set_attributes(question.span, fallback=Outcome.LATE.value)
        self._parts.telemetry.count(MetricName.LATE_PLANS)

    def _count_discarded(self, sequence: Sequence) -> None:
        sequence.report.discarded_plans += 1
        self._parts.telemetry.count(MetricName.DISCARDED_PLANS)

    def _end(self, question: Question, outcome: Outcome) -> None:
        set_attributes(question.span, outcome=outcome.value)
        question.span.end()
