"""Carries out what was decided about a sequence's resident set: load in waves, then commit.

Ids are allocated before a load starts and named by no table until it is done; blocks that leave are
freed in the commit, which runs between two steps. A step launched before may still read them: whoever
writes a freed block next does it behind that step, on its stream or behind an event recorded after it.
"""

import time
from collections.abc import Iterable, Iterator, Mapping

from forepage.errors import DependencyError
from forepage.kv.ids import BlockIdx
from forepage.kv.prefetch_plan import LoadWave, fit_waves, plan_residency
from forepage.kv.resident_set import NOT_RESIDENT
from forepage.telemetry import MetricName, SpanName, set_attributes
from forepage.worker.commands import SKIP, BlockLoad
from forepage.worker.full_by_room import FullByRoom
from forepage.worker.lookahead_state import LoadUnderWay, Outcome, Question
from forepage.worker.parts import WorkerParts
from forepage.worker.questions import num_candidates
from forepage.worker.quota import (
    held_quota,
    lend,
    lendable,
    room,
    shrink_promise,
    take_back,
    try_change_promise,
)
from forepage.worker.sequence import Room, Sequence

PROMPT_SCORE = 1.0
"""Above every probability: what the prompt's tail looked at is kept before what was predicted."""
PROMPT_SHARE = 0.75
"""Of the budget, at most: the rest is the memory indexer's."""
REPAIR_SCORE = 2.0
"""Above every probability: what an audit found missing is kept before what was predicted."""


class Residency:
    """Starts loads and commits them; the only place that changes a sequence's resident set."""

    def __init__(self, parts: WorkerParts, full_by_room: FullByRoom) -> None:
        self._parts = parts
        self._full_by_room = full_by_room

    def start_change(self, sequence: Sequence) -> None:
        """Turn the newest plan (and repairs) into waves and start the first."""
        state, parts = sequence.lookahead, self._parts
        question, is_repair = None, state.repair_due
        if state.question is not None and state.question.answered_s is not None:
            question, state.question = state.question, None
        pinned_from, budget = self._pinned_from(sequence), sequence.guard.budget_blocks
        chosen = [BlockIdx(idx) for idx in sequence.resident.row_id_by_block if idx < pinned_from]
        current = {idx: state.scores.get(idx, 0.0) for idx in chosen}
        if state.desired is not None:
            state.scores = dict(state.desired)
            desired = state.desired
        else:
            desired = list(current.items())
        state.desired = None
        state.repair_due = state.rebalance_due = False
        state.just_loaded = frozenset()
        change = plan_residency(
            [
                *desired,
                *_best(state.prompt, PROMPT_SCORE, int(budget * PROMPT_SHARE), below=pinned_from),
                *_best(state.repair, REPAIR_SCORE, sequence.guard.max_repairs, below=pinned_from),
            ],
            current,
            always_resident_from=BlockIdx(pinned_from),
            budget_blocks=budget,
            slack_blocks=parts.settings.load_slack_blocks + self._lendable(),
        )
        if question is not None and question.answered_s is not None:
            queue_ms = (time.monotonic() - question.answered_s) * 1e3
            parts.telemetry.record(MetricName.PREFETCH_LATENCY, queue_ms, span=question.span, phase="queue")
            parts.telemetry.count(MetricName.CACHE_HITS, len(change.keep), cache="plan")
            parts.telemetry.count(MetricName.CACHE_MISSES, len(change.load), cache="plan")
            set_attributes(question.span, desired_blocks=len(desired), loaded_blocks=len(change.load))
            set_attributes(question.span, dropped_blocks=len(change.drop))
        waves = change.waves or (LoadWave((), ()),)
        outcome = Outcome.UNCHANGED if change.is_empty else Outcome.COMMITTED
        self._start_waves(sequence, waves, pinned_from, question, outcome, is_repair=is_repair)

    def keep_newest(self, sequence: Sequence) -> None:
        """No plan in time for the first step: keep the newest blocks that the budget has room for."""
        pinned_from = self._pinned_from(sequence)
        sequence.lookahead.desired = [(BlockIdx(idx), idx / pinned_from) for idx in range(pinned_from)]
        self._parts.telemetry.count(MetricName.FALLBACKS, fallback="keep_newest")
        self.start_change(sequence)

    def start_fill(self, sequence: Sequence) -> None:
        """Load every absent block: back to `full`. The promise must have been made."""
        resident = sequence.resident
        absent = [BlockIdx(idx) for idx in range(resident.num_blocks) if idx not in resident.row_id_by_block]
        self._start(sequence, LoadWave(tuple(absent), ()), (), resident.pinned_from)

    def start_exact(self, sequence: Sequence) -> None:
        """Load the keys of every absent block: the move to `exact`. The promise must have been made."""
        held = sequence.resident.key_id_by_block
        absent = [BlockIdx(idx) for idx in range(sequence.resident.num_blocks) if idx not in held]
        pinned_from = sequence.resident.pinned_from  # nothing is dropped here, so nothing becomes chosen
        sequence.lookahead.want_exact = False
        wave = LoadWave(tuple(absent), ())
        self._start(sequence, wave, (), pinned_from, for_exact=True, is_repair=True)

    def leave_exact(self, sequence: Sequence) -> None:
        """Back to paging: keys of absent rows and the staging blocks are given up at once."""
        resident = sequence.resident
        keys = [idx for idx in resident.key_id_by_block if idx not in resident.row_id_by_block]
        self._commit(sequence, resident.pinned_from, {}, {}, (), keys)
        self._give_up_staging(sequence)
        shrink_promise(self._parts, sequence)

    def enter_exact(self, sequence: Sequence) -> None:
        """Every key is resident: give the sequence its staging blocks, so that it may pull rows."""
        holds, blocks = sequence.holds, self._parts.blocks
        if not holds.staging_ids:
            holds.staging_ids = blocks.rows.allocate(blocks.staging_blocks)
            self._parts.device.set_staging(holds.slot, holds.staging_ids)

    def drop_chosen(self, sequence: Sequence) -> None:
        """Keep only what is always resident: a paused sequence makes room for others."""
        pinned_from = self._pinned_from(sequence)
        resident = sequence.resident
        rows = [idx for idx in resident.row_id_by_block if idx < pinned_from]
        keys = [idx for idx in resident.key_id_by_block if idx < pinned_from]
        self._commit(sequence, pinned_from, {}, {}, rows, keys)
        try_change_promise(self._parts, sequence, held_quota(self._parts, sequence))

    def check_load(self, sequence: Sequence) -> None:
        """The load's event has fired: check its records again.

        Raises: DependencyError when a record changed under the load: no table ever names its blocks.
        """
        load = sequence.lookahead.load
        assert load is not None
        load.future.result()
        lost = [idx for idx in load.wave.load if not self._still_there(sequence, idx)]
        if lost:
            self._parts.telemetry.count(MetricName.FALLBACKS, len(lost), fallback="lost_record")
            raise DependencyError(
                f"blocks {sorted(lost)} of this request were lost from the cold pool; send it again",
                None,
                1.0,
            )

    def finish_load(self, sequence: Sequence) -> None:
        """Check the load, commit it, start the next wave. Raises: as `check_load`."""
        load = sequence.lookahead.load
        assert load is not None
        done_ns = time.time_ns()
        self.check_load(sequence)
        sequence.lookahead.load = None
        start_ns = time.time_ns()
        drops, held_keys = load.wave.drop, sequence.resident.key_id_by_block
        key_drops = () if sequence.keeps_keys else tuple(idx for idx in drops if idx in held_keys)
        self._commit(sequence, load.pinned_from, load.row_ids, load.key_ids, drops, key_drops)
        take_back(self._parts, load)
        self._full_by_room.on_commit(
            sequence,
            loaded_bytes=self._bytes(len(load.row_ids), len(load.key_ids)),
            dropped_bytes=self._bytes(len(drops), len(key_drops)),
        )
        if sequence.room is Room.KEPT:
            self._give_up_staging(sequence)
        elif sequence.keeps_keys and sequence.resident.keys_complete and sequence.room is not Room.LEAVING:
            self.enter_exact(sequence)
        sequence.lookahead.just_loaded |= load.row_ids.keys()
        shrink_promise(self._parts, sequence)
        self._trace(load, done_ns, start_ns)
        if load.rest:
            self._start_waves(
                sequence,
                load.rest,
                load.pinned_from,
                load.question,
                load.outcome,
                is_repair=load.is_repair,
            )
            return
        if load.question is not None:
            self._end_question(sequence, load.question, load.outcome)
        if load.is_repair and sequence.lookahead.repair_since is not None:
            waited = sequence.num_launched - sequence.lookahead.repair_since
            sequence.report.tokens_before_escalation += waited
            sequence.lookahead.repair_since = None
            sequence.lookahead.audits_from = sequence.num_launched

    def _start_waves(
        self,
        sequence: Sequence,
        waves: tuple[LoadWave, ...],
        pinned_from: int,
        question: Question | None,
        outcome: Outcome,
        *,
        is_repair: bool,
    ) -> None:
        """The tail may have taken room that the waves were cut for: no load is beyond promise and loan."""
        first, *rest = fit_waves(waves, room(self._parts, sequence) + self._lendable())
        self._start(
            sequence,
            first,
            tuple(rest),
            pinned_from,
            question=question,
            outcome=outcome,
            is_repair=is_repair,
        )

    def _start(
        self,
        sequence: Sequence,
        wave: LoadWave,
        rest: tuple[LoadWave, ...],
        pinned_from: int,
        *,
        question: Question | None = None,
        outcome: Outcome = Outcome.COMMITTED,
        for_exact: bool = False,
        is_repair: bool = False,
    ) -> None:
        parts, resident = self._parts, sequence.resident
        need_rows = () if for_exact else wave.load
        need_keys = [idx for idx in wave.load if idx not in resident.key_id_by_block]
        lent = lend(parts, sequence, num_rows=len(need_rows), num_keys=len(need_keys))
        row_ids = dict(zip(need_rows, parts.blocks.rows.allocate(len(need_rows)), strict=True))
        key_ids = dict(zip(need_keys, parts.blocks.keys.allocate(len(need_keys)), strict=True))
        loads = [
            BlockLoad(
                arena_offset=parts.arena.offset(sequence.arena.ref_by_block[idx]),
                row_id=row_ids.get(idx, SKIP),
                key_id=key_ids.get(idx, SKIP),
            )
            for idx in wave.load
        ]
        num_bytes = self._bytes(len(row_ids), len(key_ids))
        sequence.report.prefetch_bytes += num_bytes
        parts.telemetry.count(MetricName.PREFETCH_BYTES, num_bytes)
        parts.telemetry.count(MetricName.HOST_TO_DEVICE, num_bytes, reason="prefetch")
        sequence.lookahead.load = LoadUnderWay(
            wave=wave,
            rest=rest,
            row_ids={int(idx): row for idx, row in row_ids.items()},
            key_ids={int(idx): key for idx, key in key_ids.items()},
            future=parts.device.load(loads),
            started_ns=time.time_ns(),
            pinned_from=pinned_from,
            question=question,
            outcome=outcome,
            for_exact=for_exact,
            is_repair=is_repair,
            lent_rows=lent.rows,
            lent_keys=lent.keys,
        )

    def _lendable(self) -> int:
        """A request that waits for room goes first."""
        return 0 if self._full_by_room.is_room_wanted else lendable(self._parts)

    def _commit(
        self,
        sequence: Sequence,
        pinned_from: int,
        rows: dict[int, int],
        keys: dict[int, int],
        drop_rows: Iterable[int],
        drop_keys: Iterable[int],
    ) -> None:
        """Swap the set, make the tables say so, free what left: what attention sees changes here alone."""
        row_drops, key_drops = tuple(drop_rows), tuple(drop_keys)
        freed = sequence.resident.commit(
            pinned_from=pinned_from,
            loaded_rows=rows,
            loaded_keys=keys,
            drop_rows=row_drops,
            drop_keys=key_drops,
        )
        self._parts.device.edit_residency(
            sequence.holds.slot,
            dict.fromkeys(row_drops, NOT_RESIDENT) | rows,
            dict.fromkeys(key_drops, NOT_RESIDENT) | keys,
        )
        self._parts.blocks.rows.free(freed.row_ids)
        self._parts.blocks.keys.free(freed.key_ids)

    def _give_up_staging(self, sequence: Sequence) -> None:
        """It pulls no rows any more: none is absent, or none may be pulled."""
        holds = sequence.holds
        if holds.staging_ids:
            self._parts.blocks.rows.free(holds.staging_ids)
            holds.staging_ids = []
            self._parts.device.set_staging(holds.slot, [])

    def _bytes(self, num_rows: int, num_keys: int) -> int:
        geometry = self._parts.geometry
        return num_rows * geometry.rows_bytes + num_keys * geometry.keys_bytes

    def _still_there(self, sequence: Sequence, block_idx: int) -> bool:
        return self._parts.arena.matches(sequence.arena.ref_by_block[block_idx])

    def _pinned_from(self, sequence: Sequence) -> int:
        return num_candidates(sequence, self._parts.settings, self._parts.geometry)

    def _trace(self, load: LoadUnderWay, done_ns: int, commit_ns: int) -> None:
        """Children of the interval's span: load (issue to event), wait (event to commit), commit."""
        if load.question is None:
            return
        telemetry, parent = self._parts.telemetry, load.question.span
        num_loaded = len(load.wave.load)
        span = telemetry.start_span(SpanName.LOAD, parent, start_ns=load.started_ns, num_blocks=num_loaded)
        fired_ns = min(load.finished_ns or done_ns, done_ns)
        span.end(fired_ns)
        telemetry.start_span(SpanName.WAIT, parent, start_ns=fired_ns).end(commit_ns)
        telemetry.start_span(SpanName.COMMIT, parent, start_ns=commit_ns, num_blocks=num_loaded).end()
        for phase, begin, end in (
            ("load", load.started_ns, fired_ns),
            ("wait", fired_ns, commit_ns),
            ("commit", commit_ns, time.time_ns()),
        ):
            telemetry.record(MetricName.PREFETCH_LATENCY, (end - begin) / 1e6, span=parent, phase=phase)

    def _end_question(self, sequence: Sequence, question: Question, outcome: Outcome) -> None:
        latency_ms = (time.monotonic() - question.asked_s) * 1e3
        sequence.report.latency_ms.add(latency_ms)
        self._parts.telemetry.record(
            MetricName.PREFETCH_LATENCY, latency_ms, span=question.span, phase="total"
        )
        # steps launched behind the boundary's, and with the set of before; the first plan has no boundary
        steps = sequence.num_launched - question.asked_tokens
        if question.interval > 0:
            sequence.report.commit_steps.add(steps)
            self._parts.telemetry.record(MetricName.COMMIT_STEPS, steps, span=question.span)
        set_attributes(
            question.span,
            outcome=outcome.value,
            latency_ms=latency_ms,
            commit_steps=steps,
            resident_blocks=sequence.resident.num_resident,
        )
        question.span.end()


def _best(
    mass_by_block: Mapping[BlockIdx, float], score: float, count: int, *, below: int
) -> Iterator[tuple[BlockIdx, float]]:
    """The `count` blocks of most mass among those before `below`, each with `score` plus its mass."""
    candidates = (idx for idx in mass_by_block if idx < below)
    for idx in sorted(candidates, key=lambda idx: (-mass_by_block[idx], idx))[:count]:
        yield idx, score + mass_by_block[idx]
