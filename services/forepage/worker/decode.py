"""Decode steps for every sequence that can take one: launch, and later read, account, write back.

A step may be launched before the one ahead of it is read. What a step saw (its resident set, whether the
sequence was clean, its state at a block's end) is kept with it, and becomes the sequence's when it is read. A
sequence that has ended by then takes nothing of it: not its token, its counts, its block or its state.
"""

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from forepage.errors import ForepageError, IntegrityError
from forepage.kv.geometry import C4_RATIO
from forepage.telemetry import MetricName
from forepage.worker.launched_step import DecodeRow, LaunchedStep
from forepage.worker.lookahead import Lookahead
from forepage.worker.pace import Pace
from forepage.worker.parts import WorkerParts
from forepage.worker.quota import held_quota
from forepage.worker.report import StepView
from forepage.worker.sampler import Pick
from forepage.worker.sequence import Phase, Sequence, Snapshot, StepTap
from forepage.worker.write_back import WriteBack


@dataclass(frozen=True)
class _Part:
    """One sequence's part in a step under way; `num_selected`: entries its indexers chose, if it may pull."""

    sequence: Sequence
    view: StepView
    clean: bool
    is_tapped: bool
    is_held: bool
    awaits_verdict: bool
    snapshot: Snapshot | None
    num_selected: int


@dataclass(frozen=True)
class _Unread:
    """A step under way."""

    parts: tuple[_Part, ...]
    step: LaunchedStep


class Decode:
    """Steps batches; the tokens it reads are for the loop to emit."""

    def __init__(self, parts: WorkerParts, lookahead: Lookahead, write_back: WriteBack, pace: Pace) -> None:
        self._parts = parts
        self._pace = pace
        self._lookahead = lookahead
        self._write_back = write_back
        self._unread: deque[_Unread] = deque()
        self._views: dict[int, tuple[tuple[int, ...], StepView]] = {}

    @property
    def num_unread(self) -> int:
        """Steps launched and not read."""
        return len(self._unread)

    @property
    def must_read_all(self) -> bool:
        """Whether what is under way must be read before anything is launched.

        A token waits for a verdict and no step may run ahead of that, or the device has left a row out.
        """
        may_run_ahead = self._parts.settings.ahead_of_verdicts
        return any(
            part.sequence.lookahead.next_is_left_out if part.awaits_verdict else part.is_held
            for unread in self._unread
            for part in unread.parts
            if part.awaits_verdict or not may_run_ahead
        )

    def can_grow(self, sequence: Sequence) -> bool:
        """Whether the block of the next token is there, or can be taken from what was promised."""
        if sequence.num_launched // self._parts.geometry.block_tokens < sequence.resident.num_blocks:
            return True
        holds, held = sequence.holds, held_quota(self._parts, sequence)
        return held.rows < holds.row_promise and held.keys < holds.key_promise

    def launch(self, batch: Seq[Sequence]) -> None:
        """Start processing each sequence's newest token."""
        for sequence in batch:
            self._grow(sequence)
        self._lookahead.begin_step()
        rows = [self._row(sequence) for sequence in batch]
        device = self._parts.device
        with device.stopwatch.time(self._pace.saw_decode):
            step = device.decode(rows)
        for fallback in step.fallbacks:
            self._parts.telemetry.count(MetricName.FALLBACKS, fallback=fallback)
        launched = zip(batch, rows, strict=True)
        self._unread.append(_Unread(tuple(self._part(*pair) for pair in launched), step))

    def read(self) -> Iterator[tuple[Sequence, Pick]]:
        """The oldest step's tokens in the order of its batch, each to be emitted before the next is taken.

        A sequence whose step missed evidence and is made again, or was left out, has none among them.

        Raises: IntegrityError when a step attended less than it selected.
        """
        unread = self._unread.popleft()
        result = unread.step.read()
        for row, part in enumerate(unread.parts):
            part.sequence.num_unread -= 1
            part.sequence.unread_taps -= part.is_tapped
            if part.sequence.phase is Phase.DONE:
                continue
            if part.awaits_verdict and part.sequence.lookahead.next_is_left_out:
                part.sequence.lookahead.next_is_left_out = False
                continue
            if result.unserved[row]:
                raise IntegrityError(f"{result.unserved[row]} selected rows were neither resident nor pulled")
            tap = unread.step.tap(row) if part.is_tapped else None
            audit = tap.audit if tap is not None else None
            if audit and self._lookahead.must_redo(part.sequence, audit, is_held=part.is_held):
                continue
            self._take(part, result.pulled[row], tap)
            yield part.sequence, result.picks[row]

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        self._views.pop(sequence.incarnation, None)

    def _row(self, sequence: Sequence) -> DecodeRow:
        step = sequence.report.decode_steps + sequence.num_unread + 1
        audit_layers = self._lookahead.device_audit(sequence, step)
        is_held = bool(audit_layers) and self._lookahead.holds_token(sequence, step)
        return DecodeRow(
            slot=sequence.holds.slot,
            position=sequence.num_launched,
            token=None if sequence.num_unread else sequence.tokens[-1],
            sampling=sequence.sampling_row(sequence.num_launched + 1),
            wants_tap=sequence.request.reads or self._lookahead.wants_tap(sequence, step),
            pulls=bool(sequence.holds.staging_ids),
            audit_layers=audit_layers,
            wants_hidden=step >= sequence.lookahead.next_boundary,
            wants_indexer=sequence.request.reads
            or self._lookahead.reads_indexer(sequence, by_device=bool(audit_layers)),
            is_held=is_held,
            marks_miss=is_held and self._parts.settings.ahead_of_verdicts,
            awaits_verdict=sequence.num_unread > 0 and sequence.lookahead.newest_is_held,
        )

    def _part(self, sequence: Sequence, row: DecodeRow) -> _Part:
        """What the step just launched saw. Once a key is absent a sequence's blocks are no longer clean."""
        view = self._view(sequence)
        clean = sequence.clean and view.keys_complete
        sequence.num_unread += 1
        sequence.unread_taps += row.wants_tap
        ends_block = (row.position + 1) % self._parts.geometry.block_tokens == 0
        snapshot = self._write_back.snapshot_at(sequence, row.position + 1) if clean and ends_block else None
        sequence.lookahead.newest_is_held = row.is_held
        num_visible = (row.position + 1) // C4_RATIO if row.pulls else 0
        num_selected = len(self._parts.geometry.c4_layers) * min(self._parts.topk, num_visible)
        return _Part(
            sequence, view, clean, row.wants_tap, row.is_held, row.awaits_verdict, snapshot, num_selected
        )

    def _view(self, sequence: Sequence) -> StepView:
        """Made anew only when something changed: it counts every block of the sequence."""
        resident, load = sequence.resident, sequence.lookahead.load
        in_flight = max(len(load.row_ids), len(load.key_ids)) if load else 0
        staging, budget = len(sequence.holds.staging_ids), sequence.guard.budget_blocks
        key = (resident.version, in_flight, staging, budget)
        kept = self._views.get(sequence.incarnation)
        if kept is not None and kept[0] == key:
            return kept[1]
        view = StepView.of(
            resident, self._parts.geometry, staging_blocks=staging, in_flight=in_flight, budget=budget
        )
        self._views[sequence.incarnation] = key, view
        return view

    def _take(self, part: _Part, num_pulled: int, tap: StepTap | None) -> None:
        sequence = part.sequence
        sequence.num_processed += 1
        sequence.clean &= part.clean
        sequence.report.add_step(part.view)
        if demand_bytes := num_pulled * self._parts.geometry.row_bytes:
            sequence.report.demand_bytes += demand_bytes
            self._parts.telemetry.count(MetricName.DEMAND_BYTES, demand_bytes)
            self._parts.telemetry.count(MetricName.HOST_TO_DEVICE, demand_bytes, reason="demand")
        if part.num_selected:
            hits = part.num_selected - num_pulled
            self._parts.telemetry.count(MetricName.CACHE_HITS, hits, cache="rows")
            self._parts.telemetry.count(MetricName.CACHE_MISSES, num_pulled, cache="rows")
        if sequence.num_processed % self._parts.geometry.block_tokens == 0:
            self._write_back.store_finished(sequence)
            if sequence.clean and part.snapshot is not None:
                sequence.snapshot = part.snapshot
        if tap is not None:
            self._look_ahead(sequence, tap)

    def _look_ahead(self, sequence: Sequence, tap: StepTap) -> None:
        """A step whose scores can't be audited (not finite) ends its own request, not the worker."""
        if sequence.report.reads is not None:
            sequence.report.reads.add_step(tap.indexer, tap.row)
        try:
            self._lookahead.after_step(sequence, tap)
        except IntegrityError:
            raise
        except ForepageError as error:
            sequence.failure = ForepageError(f"this request's scores can't be audited: {error}")

    def _grow(self, sequence: Sequence) -> None:
        resident, blocks = sequence.resident, self._parts.blocks
        if sequence.num_launched // self._parts.geometry.block_tokens < resident.num_blocks:
            return
        row_id, key_id = blocks.rows.allocate(1)[0], blocks.keys.allocate(1)[0]
        block_idx = resident.append(row_id, key_id)
        self._parts.device.edit_residency(sequence.holds.slot, {block_idx: row_id}, {block_idx: key_id})
