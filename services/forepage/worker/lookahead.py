"""The lookahead of one worker: asks at boundaries, applies plans between steps, never waits for one.

Owns the questions that are open. A reply of an older boundary or incarnation is discarded and counted;
what can't be asked (index down) falls back to the last set, and says so in the span.
"""

import itertools
import math
import time

from forepage.errors import IntegrityError
from forepage.kv.guard import GuardAction
from forepage.kv.ids import BlockIdx
from forepage.rpc import index_pb2 as pb
from forepage.settings import OnIndexDown, ResidencyMode
from forepage.telemetry import MetricName, SpanName, set_attributes
from forepage.trace_context import traceparent_of
from forepage.worker.asked import Asked
from forepage.worker.auditing import Auditing
from forepage.worker.device_audit import StepAudit
from forepage.worker.full_by_room import FullByRoom
from forepage.worker.lookahead_state import Outcome, Question
from forepage.worker.parts import WorkerParts
from forepage.worker.questions import (
    audit_messages,
    audit_steps,
    audited_layers,
    layers_of_step,
    lookahead_request,
    num_candidates,
    predict_message,
)
from forepage.worker.quota import grow_promise
from forepage.worker.residency import Residency
from forepage.worker.sequence import Phase, Room, Sequence, StepTap

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
"""Its multiples, modulo 1, fill the unit interval evenly however many are taken."""


class Lookahead:
    """Questions, answers and their consequences for every sequence of a worker."""

    def __init__(
        self, parts: WorkerParts, auditing: Auditing, residency: Residency, full_by_room: FullByRoom
    ) -> None:
        self._parts = parts
        self._full_by_room = full_by_room
        self._auditing = auditing
        self._residency = residency
        self._ids = itertools.count(1)
        self._steps = 0
        self._asked: dict[int, Asked] = {}

    def ask_first(self, sequence: Sequence, tap: StepTap) -> bool:
        """After prefill: the plan for the first interval. False when the index can't be asked."""
        self._begin_interval(sequence)
        return self._ask(sequence, tap, predict=True, audit=False)

    def wants_tap(self, sequence: Sequence, step: int) -> bool:
        """Whether `after_step` may need what the sequence's step-th decode step leaves."""
        state = sequence.lookahead
        if sequence.request.mode is ResidencyMode.FULL:
            return False
        return step >= state.next_boundary or step in state.audit_steps

    def begin_step(self) -> None:
        """A decode step of the batch is about to be launched: its audits look at layers of its own."""
        self._steps += 1

    def device_audit(self, sequence: Sequence, step: int) -> tuple[int, ...]:
        """In which c4 layers the device audits the sequence's step-th decode step, about to be launched.

        The same for all sequences of a step, so that their audits are few launches; for a step that is made
        again those of the first time.
        """
        if not self._parts.device.makes_audits or not self.wants_tap(sequence, step):
            return ()
        if not _is_audited(sequence) or sequence.resident.keys_complete:
            return ()
        state, num_c4 = sequence.lookahead, len(self._parts.geometry.c4_layers)
        if not state.is_redone or sequence.num_unread:  # the first step behind a miss is the one made again
            state.audit_layers = layers_of_step(self._steps, self._parts.settings.audit_layers, num_c4)
        return state.audit_layers

    def reads_indexer(self, sequence: Sequence, *, by_device: bool) -> bool:
        """Whether the host looks at what a tapped step chose: to audit it, unless the device does."""
        in_exact = sequence.guard.exact and sequence.request.mode is ResidencyMode.GUARDED
        return in_exact or (_is_audited(sequence) and not by_device)

    def holds_token(self, sequence: Sequence, step: int) -> bool:
        """Whether the step-th step's token waits for the verdict: of the first ones."""
        is_guarded = sequence.request.mode is ResidencyMode.GUARDED
        return is_guarded and step <= self._parts.settings.early_audit_steps

    def must_redo(self, sequence: Sequence, audit: StepAudit, *, is_held: bool) -> bool:
        """Take in what the device found about the step just read; whether it must be made again.

        Raises: IntegrityError if so and the step missed nothing.
        """
        state = sequence.lookahead
        is_repeat, state.is_redone = state.is_redone, False
        state.next_is_left_out = is_held and audit.has_missed
        state.audit_layers = audit.layers
        must = self._auditing.take_audit(sequence, audit, is_held=is_held, is_repeat=is_repeat)
        if must and not state.next_is_left_out:
            raise IntegrityError(
                "a step is made again that missed nothing: the one behind it was not left out"
            )
        return must

    def after_step(self, sequence: Sequence, tap: StepTap) -> None:
        """After a decode step of this sequence: a boundary, an audit, or nothing."""
        state, settings = sequence.lookahead, self._parts.settings
        step = sequence.report.decode_steps
        is_boundary = step >= state.next_boundary and tap.hidden is not None
        if not self.wants_tap(sequence, step):
            return
        is_guarded = sequence.request.mode is ResidencyMode.GUARDED
        if is_boundary:
            if is_guarded and sequence.guard.exact and sequence.holds.staging_ids and tap.indexer:
                self._auditing.shadow(sequence, tap, self._layers(sequence))
            self._end_of_interval(sequence)
            self._begin_interval(sequence)
        candidates = num_candidates(sequence, settings, self._parts.geometry)
        needs_none_absent = sequence.fits_budget(candidates) or sequence.room is Room.KEPT
        if needs_none_absent and sequence.resident.rows_complete:
            return
        if is_boundary and self._full_by_room.try_return(sequence):
            self._residency.start_fill(sequence)
        predict = is_boundary and sequence.room is not Room.FILLING
        audit = _is_audited(sequence) and not sequence.resident.keys_complete
        self._ask(sequence, tap, predict=predict, audit=audit and tap.audit is None and bool(tap.indexer))

    def on_reply(self, reply: pb.LookaheadReply) -> None:
        """A reply of the index: its audits count, its plan too if it is of the newest question."""
        asked = self._asked.pop(reply.request_id, None)
        if asked is None:
            return
        sequence, question = asked.sequence, asked.question
        if reply.error_code:
            self._refused(asked, f"{reply.error_code}: {reply.error_message}")
            return
        if not asked.accepts(reply):
            self._refused(asked, "the reply does not answer the question")
            return
        is_newest = question is not None and sequence.lookahead.question is question
        if question is not None and is_newest:
            self._take_plan(sequence, question, reply.plan)
        sequence.report.audits_lost += len(asked.audits) - len(reply.audits)
        self._auditing.take_results(sequence, reply.audits)
        if question is not None and not is_newest:
            self._count_discarded(sequence)

    def on_index_down(self) -> None:
        """The stream broke: every open question stays unanswered."""
        for asked in self._asked.values():
            sequence, question = asked.sequence, asked.question
            sequence.report.audits_lost += len(asked.audits)
            if question is not None and sequence.lookahead.question is question:
                sequence.lookahead.question = None
                self._fall_back(sequence, question)
        self._asked.clear()

    def must_read_first(self, sequence: Sequence) -> bool:
        """Whether `tick` would change the resident set under an audit: it is about the set its step saw.

        A boundary's step without one only asks for a plan, and can be read after the commit: no step waits.
        Nor does one where steps run ahead of verdicts: the device audits with the tables of the step.

        Raises: DependencyError when a record changed under a load that is done.
        """
        parts = self._parts
        if parts.settings.ahead_of_verdicts and parts.device.makes_audits and not sequence.guard.exact:
            return False
        return _is_audited(sequence) and self._is_commit_due(sequence)

    def _is_commit_due(self, sequence: Sequence) -> bool:
        state = sequence.lookahead
        if state.load is None:
            return state.want_exact or (not sequence.is_exact and _has_exact_keys(sequence))
        if not state.load.future.done():
            return False
        self._residency.check_load(sequence)
        return True

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
        if state.load is None and state.want_exact and sequence.phase in (Phase.DECODE, Phase.PAUSED):
            self._try_exact(sequence)
        if sequence.phase is Phase.PAUSED:
            return  # it has given up its promise: nothing may be loaded
        if state.load is None and not sequence.is_exact and _has_exact_keys(sequence):
            self._residency.leave_exact(sequence)
        if state.load is None and (state.desired is not None or state.repair_due or state.rebalance_due):
            self._residency.start_change(sequence)

    def make_room(self, sequence: Sequence) -> None:
        """The tail can't grow: give up what the budget does not cover, once more may be paged again."""
        if sequence.request.mode is ResidencyMode.FULL or sequence.lookahead.load is not None:
            return
        candidates = num_candidates(sequence, self._parts.settings, self._parts.geometry)
        rows = sequence.resident.row_id_by_block
        if sum(idx < candidates for idx in rows) > sequence.guard.budget_blocks:
            sequence.lookahead.rebalance_due = True

    def forget(self, sequence: Sequence) -> None:
        """The sequence ended: its open questions end with it."""
        state = sequence.lookahead
        for request_id in [key for key, asked in self._asked.items() if asked.sequence is sequence]:
            sequence.report.audits_lost += len(self._asked.pop(request_id).audits)
        if state.question is not None:
            self._end(state.question, Outcome.ENDED)
            state.question = None
        if state.load is not None and state.load.question is not None:
            self._end(state.load.question, Outcome.ENDED)
            state.load.question = None

    def _try_exact(self, sequence: Sequence) -> None:
        """Escalation is an allocation: with room the keys are loaded, without it the sequence waits."""
        if grow_promise(self._parts, sequence):
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
        phase = first_interval_cut(sequence.holds.slot, settings.interval_steps)
        state.next_boundary = step + settings.interval_steps - (phase if state.interval == 0 else 0)
        state.audit_steps = audit_steps(sequence, settings, step, on_device=self._parts.device.makes_audits)

    def _end_of_interval(self, sequence: Sequence) -> None:
        """Close a question whose plan never came to a load, and let the guard count the interval."""
        state = sequence.lookahead
        question = state.question
        if question is not None:
            if not question.late:
                self._count_late(sequence, question)
            if state.desired is not None:  # it waited behind a load until this boundary overtook it
                state.desired = None
                self._count_discarded(sequence)
            self._end(question, Outcome.LATE)
            state.question = None
            state.rebalance_due = True
        if sequence.request.mode is not ResidencyMode.GUARDED:
            return
        if sequence.guard.exact and not sequence.holds.staging_ids:
            return  # not there yet: what paging misses was not looked at
        sequence.guard, _ = sequence.guard.on_boundary()
        if not sequence.guard.repaired:
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
            audits = frozenset((audit.layer_idx, audit.position) for audit in request.audits)
            self._asked[request_id] = Asked(sequence, question, request.stamp, audits)
            return True
        if question is not None:
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
        predict_span = telemetry.start_span(SpanName.PREDICT, span)
        return Question(interval, time.monotonic(), sequence.num_processed, span, predict_span)

    def _layers(self, sequence: Sequence) -> list[int]:
        num_c4 = len(self._parts.geometry.c4_layers)
        return audited_layers(sequence, self._parts.settings, num_c4, num_tokens=sequence.num_processed)

    def _take_plan(self, sequence: Sequence, question: Question, plan: pb.Plan) -> None:
        question.answered_s = time.monotonic()
        question.predict_span.end()
        phase_ms = (question.answered_s - question.asked_s) * 1e3
        self._parts.telemetry.record(
            MetricName.PREFETCH_LATENCY, phase_ms, span=question.span, phase="predict"
        )
        sequence.lookahead.desired = [
            (BlockIdx(idx), score) for idx, score in zip(plan.block_idx, plan.score, strict=True)
        ]

    def _refused(self, asked: Asked, why: str) -> None:
        sequence, question = asked.sequence, asked.question
        sequence.report.audits_lost += len(asked.audits)
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
        if question.answered_s is None:
            question.predict_span.end()
        set_attributes(question.span, outcome=outcome.value)
        question.span.end()


def first_interval_cut(slot: int, interval_steps: int) -> int:
    """How many steps a slot's first interval is shorter: boundaries of any number of slots spread evenly."""
    return int(slot * GOLDEN_RATIO % 1.0 * interval_steps)


def _has_exact_keys(sequence: Sequence) -> bool:
    """Whether it still holds what only `exact` needs: staging, or keys of rows that are absent."""
    resident = sequence.resident
    return bool(sequence.holds.staging_ids) or len(resident.key_id_by_block) > resident.num_resident


def _is_audited(sequence: Sequence) -> bool:
    """Whether anybody wants to know what its steps miss."""
    return sequence.request.mode is ResidencyMode.GUARDED or sequence.request.audit
