"""The worker's loop: one thread that owns every sequence and the device. Read this top-down.

Each turn: take in messages, commit what has arrived, admit, then one step: a prefill chunk (beside decode
steps a slice of one: pace.py) or a decode step for the whole batch, in turns when both are due. On a GPU the
step of a turn is launched before that of the turn before is read, so the device never waits for the host.
Nothing in it waits for another process; it sleeps only when no sequence can take a step.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import torch

from forepage.coldpool.client import Reattached
from forepage.errors import CapacityError, DependencyError, ForepageError, IntegrityError
from forepage.model.rank_group import RankLostError
from forepage.rpc import index_pb2
from forepage.rpc import worker_pb2 as pb
from forepage.settings import ResidencyMode
from forepage.telemetry import SpanName, fail_span, set_attributes
from forepage.worker.admission import Admission
from forepage.worker.auditing import Auditing
from forepage.worker.decode import Decode
from forepage.worker.events import failed_event, finished_event, refuse, started_event, tokens_event
from forepage.worker.full_by_room import FullByRoom
from forepage.worker.inbox import Inbox, Message
from forepage.worker.lookahead import Lookahead
from forepage.worker.pace import Pace
from forepage.worker.parts import WorkerParts
from forepage.worker.prefill import Prefill, PrefillEnd
from forepage.worker.questions import num_candidates
from forepage.worker.quota import shrink_promise
from forepage.worker.release import try_release
from forepage.worker.residency import Residency
from forepage.worker.sampler import Pick, sample
from forepage.worker.sequence import Phase, Sequence
from forepage.worker.stalls import Stalls
from forepage.worker.watching import give_views
from forepage.worker.write_back import WriteBack

IDLE_S = 0.25
WAITING_S = 0.002
"""How long a turn with nothing to compute waits for a message: idle, and while copies or plans are due."""


class Loop:
    """Owner of the sequences; other threads talk to it through `post`."""

    def __init__(self, parts: WorkerParts, arena: torch.Tensor) -> None:
        """`arena` is the mapped payload area, u8."""
        self._parts = parts
        self._inbox = Inbox()
        self._live: dict[int, Sequence] = {}
        self._ending: list[Sequence] = []
        self._stopping = False
        self._prefill_turn = True
        self._admission = Admission(parts)
        self._write_back = WriteBack(parts)
        self._full_by_room = FullByRoom(parts)
        self._residency = Residency(parts, self._full_by_room)
        self._auditing = Auditing(parts, arena)
        self._lookahead = Lookahead(parts, self._auditing, self._residency, self._full_by_room)
        pace = Pace(parts.device.num_prefill_parts, parts.settings.prefill_share)
        self._prefill = Prefill(parts, self._write_back, pace)
        self._decode = Decode(parts, self._lookahead, self._write_back, pace)
        self._stalls = Stalls(parts.telemetry)
        self._num_ahead = parts.ahead_steps
        self._thread = threading.Thread(target=self._run, name="loop", daemon=True)
        self.broken: BaseException | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def post(self, message: Message) -> None:
        """Run `message` on the loop's thread, between two steps."""
        self._inbox.put(message)

    def submit(self, sequence: Sequence) -> None:
        """Take a new request (any thread); once the loop has ended it is refused at once."""
        self._inbox.put(lambda: self._submit(sequence), unheard=lambda: refuse(sequence, _shutting_down()))

    def cancel(self, sequence: Sequence) -> None:
        """The caller went away: everything it holds is freed within one step (any thread)."""
        self.post(lambda: self._end(sequence))

    def take_reply(self, reply: index_pb2.LookaheadReply) -> None:
        """An answer of the index (any thread)."""
        self.post(lambda: self._on_reply(reply))

    def index_down(self) -> None:
        """The stream to the index broke (any thread)."""
        self.post(self._lookahead.on_index_down)

    def take_reattached(self, news: Reattached) -> None:
        """The cold pool manager restarted (any thread): what it lost is lost to the sequences too."""
        self.post(lambda: self._on_reattached(news))

    def watch(self) -> Future[list[pb.WatchedSequence]]:
        """What every sequence holds, seen between two steps (any thread)."""
        future: Future[list[pb.WatchedSequence]] = Future()
        self.post(lambda: give_views(future, self._live.values()))
        return future

    def stop(self, timeout_s: float) -> None:
        """End every sequence with an error, then the thread."""
        self.post(self._stop)
        self._thread.join(timeout_s)

    @property
    def is_running(self) -> bool:
        """Whether its thread may still use the device."""
        return self._thread.is_alive()

    @property
    def num_running(self) -> int:
        """Admitted sequences."""
        return len(self._live) - self._admission.num_waiting

    @property
    def num_waiting(self) -> int:
        """Requests not admitted yet."""
        return self._admission.num_waiting

    @property
    def num_sequences(self) -> int:
        """All that hold something: waiting, running, and ended ones whose copies are under way."""
        return len(self._live) + len(self._ending)

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self.broken is None and not (self._stopping and not self._ending):
                    self.turn()
        except RankLostError as error:
            self._parts.log.error("the loop lost a rank", error=str(error))
            self.give_up(DependencyError("a rank of this worker is gone; send the request again", None, 1.0))
        except BaseException as error:
            self._parts.log.error("the loop broke; the worker stops", error=repr(error), exc_info=True)
            self.give_up(error)
        finally:
            self._inbox.close()

    def give_up(self, error: BaseException) -> None:
        """Nothing can go on (any thread): every request ends with an error, and so does the worker."""
        if self.broken is not None:
            return
        self.broken = error
        told = IntegrityError("the worker broke down; send the request again")
        for sequence in list(self._live.values()):
            sequence.emit(failed_event(error if isinstance(error, DependencyError) else told))
        self._inbox.close()

    def turn(self) -> None:
        """One turn; the thread's body, or called by a test that has no thread."""
        self._take_messages()
        self._parts.device.tick()
        self._write_back.tick()
        for sequence in list(self._live.values()):
            self._guarded(sequence, self._advance)
        self._admit()
        self._release_ended()
        self._stalls.tick(self._live.values())
        prefill, decodes = self._prefill.choose(self._live.values()), self._ready()
        if prefill is not None and (self._prefill_turn or not decodes):
            if not decodes:
                self._read_steps(0)
            self._guarded(prefill, partial(self._prefill_step, beside_decode=bool(decodes)))
        elif decodes:
            self._decode_step(decodes)
        elif self._decode.num_unread:
            self._read_steps(0)
        else:
            self._wait()
        self._prefill_turn = not self._prefill_turn

    def _ready(self) -> list[Sequence]:
        """Sequences that can take a decode step."""
        decodes = (s for s in self._live.values() if s.phase is Phase.DECODE and s.blocked_since_s is None)
        return [s for s in decodes if not (s.awaits_last_token or s.lookahead.awaits_repair)]

    def _take_messages(self) -> None:
        while (message := self._inbox.take()) is not None:
            message()

    def _wait(self) -> None:
        """No sequence can take a step: wait for a message, briefly while copies or plans are due."""
        is_busy = bool(self._live or self._ending)
        if not is_busy:
            self._parts.blocks.check_idle()
        message = self._inbox.wait(WAITING_S if is_busy else IDLE_S)
        if message is not None:
            message()

    def _advance(self, sequence: Sequence) -> None:
        """What this sequence can do without a step."""
        if sequence.phase is Phase.GRANTING and sequence.grant is not None and sequence.grant.done():
            self._admission.take_grant(sequence)
        elif (
            sequence.phase is Phase.LOADING
            and sequence.prefix_load is not None
            and sequence.prefix_load.done()
        ):
            self._admission.finish_loading(sequence)
            sequence.emit(started_event(sequence))
        elif sequence.phase is Phase.FIRST_PLAN:
            self._await_first_plan(sequence)
        elif sequence.phase in (Phase.DECODE, Phase.PAUSED):
            if sequence.unread_taps and self._lookahead.must_read_first(sequence):
                self._read_steps(0)
            self._tick(sequence)

    def _tick(self, sequence: Sequence) -> None:
        if sequence.phase is Phase.DONE:
            return
        self._lookahead.tick(sequence)
        self._check_blocked(sequence)

    def _admit(self) -> None:
        for sequence in self._admission.expired():
            error = sequence.last_refusal or CapacityError("no room on this worker", None, 5.0)
            self._fail(sequence, error)
        while (oldest := self._admission.next_waiting()) is not None:
            if not self._admission.try_start(oldest):
                self._full_by_room.make_room(oldest, self._live.values())
                break
        self._full_by_room.is_room_wanted = self._admission.num_waiting > 0

    def _prefill_step(self, sequence: Sequence, *, beside_decode: bool) -> None:
        end = self._prefill.step(sequence, beside_decode=beside_decode)
        if end is None:
            return
        self._emit_token(sequence, sample(end.logits, [sequence.sampling_row(sequence.num_processed)])[0])
        if sequence.phase is Phase.PREFILL:
            self._begin_decode(sequence, end)

    def _begin_decode(self, sequence: Sequence, end: PrefillEnd) -> None:
        """`full` decodes at once; the others first get a plan, and give up what it leaves out."""
        if sequence.request.mode is ResidencyMode.FULL:
            self._start_decode(sequence)
            return
        sequence.phase = Phase.FIRST_PLAN
        sequence.first_tap = end.tap
        sequence.first_plan_by_s = time.monotonic() + self._parts.settings.first_plan_timeout_ms / 1e3

    def _await_first_plan(self, sequence: Sequence) -> None:
        """No blind steps: write-backs, then the question, the answer and its commit. Bounded in time."""
        state, is_overdue = sequence.lookahead, time.monotonic() > sequence.first_plan_by_s
        if sequence.first_tap is not None:
            if sequence.arena.writing and not is_overdue:
                return
            tap, sequence.first_tap = sequence.first_tap, None
            candidates = num_candidates(sequence, self._parts.settings, self._parts.geometry)
            if sequence.fits_budget(candidates) or self._full_by_room.try_keep(sequence):
                self._start_decode(sequence)
                return
            if not self._lookahead.ask_first(sequence, tap):
                self._residency.keep_newest(sequence)
        self._lookahead.tick(sequence)
        if state.load is not None:
            return
        if sequence.resident.pinned_from:  # a set is committed; a plan still to come may change it later
            self._start_decode(sequence)
        elif is_overdue or state.question is None:
            self._residency.keep_newest(sequence)

    def _start_decode(self, sequence: Sequence) -> None:
        shrink_promise(self._parts, sequence)
        if sequence.request.mode is ResidencyMode.EXACT and not sequence.is_full_by_room:
            self._residency.enter_exact(sequence)
        sequence.phase = Phase.DECODE
        sequence.stage_span = self._parts.telemetry.start_span(SpanName.WORKER_DECODE, sequence.span)

    def _decode_step(self, batch: list[Sequence]) -> None:
        """Launch a step of all, read those before it.

        With a sequence that the host samples nothing runs ahead; with one whose token waits for its verdict
        only if the device can leave out what was launched behind a miss (`worker.ahead_of_verdicts`).
        """
        num_ahead = self._num_ahead
        if any(sequence.is_sampled_on_host for sequence in batch):
            num_ahead = 0
            self._read_steps(0)
            batch = self._ready()
        if batch:
            self._decode.launch(batch)
        self._read_steps(num_ahead)

    def _read_steps(self, num_ahead: int) -> None:
        """Take in the oldest steps until so many are under way, and none where all must be read."""
        while self._decode.num_unread > (0 if self._decode.must_read_all else num_ahead):
            for sequence, pick in self._decode.read():
                self._emit_token(sequence, pick)
                if sequence.failure is not None and sequence.phase is not Phase.DONE:
                    self._fail(sequence, sequence.failure)

    def _emit_token(self, sequence: Sequence, pick: Pick) -> None:
        sequence.take_token(pick.token)
        sequence.emit(tokens_event(pick))
        if sequence.constraint is not None and sequence.constraint.is_broken:
            self._fail(sequence, ForepageError("the answer can't be kept to its schema any further"))
        elif sequence.says_no_more:
            self._finish(sequence, pb.FINISH_REASON_STOP)
        elif sequence.num_generated >= sequence.request.max_tokens:
            self._finish(sequence, pb.FINISH_REASON_LENGTH)

    def _finish(self, sequence: Sequence, reason: pb.FinishReason) -> None:
        self._write_back.store_resume(sequence)
        self._lookahead.forget(sequence)
        sequence.emit(finished_event(self._parts, sequence, reason))
        self._end(sequence)

    def _submit(self, sequence: Sequence) -> None:
        self._live[sequence.incarnation] = sequence
        if self._stopping or self.broken is not None:  # `give_up` may have told the others already
            self._fail(sequence, _shutting_down())
            return
        self._guarded(sequence, self._admission.submit)

    def _on_reply(self, reply: index_pb2.LookaheadReply) -> None:
        self._lookahead.on_reply(reply)

    def _on_reattached(self, news: Reattached) -> None:
        """Sequences whose records are gone end; a new arena can't be swapped under a running worker."""
        void = set(news.void)
        for sequence in list(self._live.values()):
            if void.intersection(sequence.arena.all_refs()):
                self._fail(
                    sequence, DependencyError("the cold pool lost this request's blocks; retry", None, 1.0)
                )
        if news.new_arena is not None:
            raise DependencyError("the cold pool has a new arena; the worker must start again")

    def _guarded(self, sequence: Sequence, act: Callable[[Sequence], None]) -> None:
        """A request's own error ends that request; a broken law ends the worker."""
        try:
            act(sequence)
        except IntegrityError:
            raise
        except ForepageError as error:
            self._fail(sequence, error)

    def _fail(self, sequence: Sequence, error: ForepageError) -> None:
        fail_span(sequence.span, error)
        sequence.emit(failed_event(error))
        self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        """Take the sequence out of every step; what it holds is released once its copies are over."""
        if self._live.pop(sequence.incarnation, None) is None:
            return
        self._admission.remove(sequence)
        self._lookahead.forget(sequence)
        self._decode.forget(sequence)
        if sequence.stage_span is not None:
            sequence.stage_span.end()
        set_attributes(sequence.span, output_tokens=sequence.num_generated)
        sequence.phase = Phase.DONE
        self._ending.append(sequence)

    def _release_ended(self) -> None:
        self._ending = [sequence for sequence in self._ending if not try_release(self._parts, sequence)]

    def _check_blocked(self, sequence: Sequence) -> None:
        """Paused, or unable to grow: it may wait for room as long as an admission may."""
        can_step = sequence.phase is Phase.DECODE and self._decode.can_grow(sequence)
        if can_step:
            sequence.blocked_since_s = None
        elif sequence.blocked_since_s is None:
            sequence.blocked_since_s = time.monotonic()
        elif time.monotonic() - sequence.blocked_since_s > self._parts.settings.admission_timeout_s:
            raise CapacityError("no room to go on with this request; send it again", None, 5.0)
        if not can_step and sequence.phase is Phase.DECODE:
            self._lookahead.make_room(sequence)

    def _stop(self) -> None:
        self._stopping = True
        for sequence in list(self._live.values()):
            self._fail(sequence, _shutting_down())


def _shutting_down() -> DependencyError:
    return DependencyError("the worker is shutting down", None, 1.0)
