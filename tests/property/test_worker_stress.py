"""A decode worker against chance, everything real but its processes: loop, pools, cold pool, arena, index.

Arrivals, aborts, evictions, late, lost, repeated and reordered answers, damage, and restarts of the worker,
of the cold pool manager and of the index come in any order. After every step the laws of every owner hold.
Two more things are oracles: the tokens of `full`, alone, and the recall of brute force at the same step.
"""

import math
import tempfile
from collections import Counter
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test
from opentelemetry.trace import INVALID_SPAN

from forepage.errors import CapacityError, ForepageError
from forepage.index.key_store import KeyStore
from forepage.index.planner import Planner
from forepage.index.question import QuestionLimits
from forepage.index.scorer import Scorer
from forepage.index.servicer import LookaheadServicer
from forepage.kv.evidence import AuditVerdict
from forepage.model.memory_indexer import MemoryIndexer
from forepage.rpc import index_pb2
from forepage.settings import SEEDED_MODEL, ModelSettings, OnIndexDown, ResidencyMode
from forepage.telemetry import open_telemetry
from forepage.worker.assembly import ModelFolder
from forepage.worker.questions import audit_messages
from forepage.worker.sequence import Phase, Sequence, StepTap
from rigs.brute_force import brute_force
from rigs.pool_arena import OTHER, PoolArena, run_now
from rigs.worker import Running, WorkerRig, worker_rig
from rigs.worker_machine import MAX_TOKENS, SETTINGS, HeldExecutor, WorkerMachine, spoil

NUM_SLOTS = 60
Step = tuple[int, int]
"""Incarnation and position of an audited step."""


@cache
def continuation(prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    """What `full` says behind these tokens, alone and without a cache."""
    with worker_rig() as rig:
        running = rig.submit(prompt, max_tokens=max_tokens)
        rig.run(running)
        return tuple(running.tokens)


class StressMachine(WorkerMachine):
    """The machine over the real cold pool and the real index; `seen` counts what came to pass."""

    rig_settings = SETTINGS | {"random_audits": 2, "early_audit_steps": 4}

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen
        self.past: list[Running] = []
        self.cancelled: set[int] = set()
        self.wanted: dict[Step, tuple[int, int]] = {}
        self.partial: set[Step] = set()
        self.recalls: dict[int, list[float]] = {}
        self.delivered: list[index_pb2.LookaheadReply] = []
        self.answers_at_once = True

    @initialize(on_down=st.sampled_from(list(OnIndexDown)))
    def start(self, on_down: OnIndexDown) -> None:
        self.on_down = on_down
        self.patch_time()
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="fp-", dir="/dev/shm")))
        telemetry = open_telemetry("stress", instance_id="stress")
        self.stack.callback(telemetry.close)
        model = ModelFolder.read(ModelSettings(path=SEEDED_MODEL))
        self.arena = PoolArena(folder, model.geometry, NUM_SLOTS, telemetry)
        self.arena.pool.add_holder(OTHER)
        self.start_index(model)
        self.worker = self.stack.enter_context(ExitStack())
        self.open_worker()
        self.submit(1_300, 0, ResidencyMode.GUARDED, MAX_TOKENS, 1, "")
        self.turn(25)
        self.submit(1_300, 0, ResidencyMode.EXACT, MAX_TOKENS, 1, "")
        self.turn(5)

    def start_index(self, model: ModelFolder) -> None:
        device = torch.device("cpu")
        indexer = MemoryIndexer.load(SEEDED_MODEL, model.spec, model.geometry.format, device)
        limits = QuestionLimits.of_model(
            model.spec,
            model.geometry,
            num_target_layers=len(indexer.target_layers),
            threshold=indexer.threshold,
        )
        self.planner = Planner(Scorer(indexer, model.geometry, device), limits)
        self.store = KeyStore(self.arena.path, model.geometry, device)
        telemetry = open_telemetry("index", instance_id="stress")
        self.stack.callback(telemetry.close)
        self.servicer = LookaheadServicer(
            self.store,
            self.planner,
            publisher=None,
            telemetry=telemetry,
            max_inflight=8,
            clock=self.clock.monotonic,
        )

    def open_worker(self) -> None:
        self.rig: WorkerRig = self.worker.enter_context(
            worker_rig(arena=self.arena, on_index_down=self.on_down, **self.rig_settings)
        )
        self.copies = HeldExecutor()
        self.rig.parts.device.local.copies._executor = self.copies  # type: ignore[assignment]
        self.arena.on_reattach = self.rig.loop.take_reattached
        self.rig.index.auto = self.on_ask
        self.watch_audits()

    @rule(times=st.integers(15, 60))
    def turn(self, times: int) -> None:
        for _ in range(times):
            self.turn_once()

    @rule()
    def turn_on(self) -> None:
        """Most of the time nothing happens."""
        self.turn(30)

    # The index

    def on_ask(self, request: index_pb2.LookaheadRequest) -> index_pb2.LookaheadReply | None:
        """The step has just been taken: what it missed is found by brute force before anything changes."""
        running = self.running_of(request.stamp.incarnation)
        if request.audits:
            verdicts = [brute_force(self.rig, running, audit) for audit in request.audits]
            self.wanted[request.stamp.incarnation, request.audits[0].position] = _sum(verdicts)
        return self.reply_to(request) if self.answers_at_once else None

    def running_of(self, incarnation: int) -> Running:
        return next(one for one in self.running if one.sequence.incarnation == incarnation)

    def reply_to(self, request: index_pb2.LookaheadRequest) -> index_pb2.LookaheadReply:
        """What the index says now; blocks that changed hands since the question are unread."""
        reply = index_pb2.LookaheadReply(request_id=request.request_id, stamp=request.stamp)
        try:
            found = self.planner.answer(request, self.store.current(), lambda: None)
        except ForepageError as error:
            reply.error_code, reply.error_message = error.code, error.message
            return reply
        self.servicer._fill(reply, found, request, INVALID_SPAN)
        self.delivered.append(reply)
        return reply

    def watch_audits(self) -> None:
        """Every audit that counts is compared with brute force at the same step."""
        auditing = self.rig.loop._auditing
        take, take_results, audit_here = auditing._take, auditing.take_results, auditing.audit_here

        def spy_take(sequence: Sequence, position: int, verdicts: Seq[AuditVerdict]) -> None:
            found = _sum([(one.num_evidence, one.num_evidence_resident) for one in verdicts])
            step = (sequence.incarnation, position)
            if step not in self.partial:
                assert found == self.wanted[step], "the audit and brute force differ"
                self.seen["audits"] += 1
                self.seen["misses"] += found[1] < found[0]
            if found[0]:
                self.recalls.setdefault(sequence.incarnation, []).append(found[1] / found[0])
            take(sequence, position, verdicts)

        def spy_results(sequence: Sequence, results: Seq[index_pb2.AuditResult]) -> None:
            self.partial |= {(sequence.incarnation, one.position) for one in results if one.num_unread}
            take_results(sequence, results)

        def spy_here(sequence: Sequence, tap: StepTap, layers: Seq[int], num_blocks: int) -> None:
            asked = audit_messages(sequence, tap, layers, num_blocks=num_blocks, topk=self.rig.parts.topk)
            running = self.running_of(sequence.incarnation)
            verdicts = [brute_force(self.rig, running, audit) for audit in asked]
            self.wanted[sequence.incarnation, sequence.num_processed - 1] = _sum(verdicts)
            self.seen["audits of the worker"] += 1
            audit_here(sequence, tap, layers, num_blocks)

        auditing._take = spy_take  # type: ignore[method-assign]
        auditing.take_results = spy_results  # type: ignore[method-assign]
        auditing.audit_here = spy_here  # type: ignore[method-assign]

    @precondition(lambda self: self.rig.index.questions)
    @rule(data=st.data(), times=st.integers(1, 2))
    def answer(self, data: st.DataObject, times: int) -> None:
        """Any question, the oldest or not, once or twice, also one that was answered before."""
        place = data.draw(st.integers(0, len(self.rig.index.questions) - 1))
        question = self.rig.index.questions.pop(place)
        for _ in range(times):
            self.rig.index.answer(self.reply_to(question))

    @precondition(lambda self: self.rig.index.questions)
    @rule(how=st.sampled_from(["stamp", "incarnation", "evidence", "masses", "scores", "error", "more"]))
    def answer_badly(self, how: str) -> None:
        reply = self.reply_to(self.rig.index.questions.pop(0))
        spoil(reply, how)
        self.rig.index.answer(reply)

    @precondition(lambda self: self.delivered)
    @rule(data=st.data())
    def answer_again(self, data: st.DataObject) -> None:
        """A reply of long ago, to this worker or to the one before it."""
        self.rig.index.answer(data.draw(st.sampled_from(self.delivered[-8:])))

    @rule()
    def answer_by_itself(self) -> None:
        self.answers_at_once = not self.answers_at_once

    # The cold pool

    @rule()
    def lose_the_cold_pool(self) -> None:
        if self.arena.is_down:
            self.arena.come_back()
        else:
            self.arena.is_down = True

    @rule()
    def restart_the_manager(self) -> None:
        self.arena.come_back(as_new=True)
        self.arena.pool.add_holder(OTHER)
        self.seen["managers"] += 1

    @rule()
    def hold_the_cold_pools_answers(self) -> None:
        self.arena.is_slow = not self.arena.is_slow
        if not self.arena.is_slow:
            self.arena.catch_up()

    @rule()
    def lose_the_cold_pools_answers(self) -> None:
        """It did what it was asked, and nobody heard."""
        self.arena.loses_replies = not self.arena.loses_replies

    def calm_the_cold_pool(self) -> None:
        self.arena.loses_replies = self.arena.is_slow = False
        self.arena.catch_up()
        if self.arena.is_down:
            self.arena.come_back()

    @precondition(lambda self: not self.arena.is_down and self.arena.pool.counts().cached)
    @rule(num_evicted=st.integers(1, 8))
    def evict_for_others(self, num_evicted: int) -> None:
        """Another worker takes slots, what nobody leases is evicted for it, and gives them back."""
        before, counts = self.arena.pool.counters.evictions, self.arena.pool.counts()
        try:
            refs = run_now(self.arena.pool.reserve(OTHER, counts.free + min(num_evicted, counts.cached)))
        except CapacityError:
            return  # what is cached is in doubt: a new manager has not heard everybody
        for ref in refs:
            self.arena.payload(ref).fill_(0xFF)
        self.arena.pool.release(OTHER, refs)
        self.seen["evictions"] += self.arena.pool.counters.evictions - before

    @precondition(lambda self: any(one.sequence.arena.ref_by_block for one in self.live))
    @rule(data=st.data())
    def lose_a_record(self, data: st.DataObject) -> None:
        """The scrubber finds it damaged."""
        owners = [one for one in self.live if one.sequence.arena.ref_by_block]
        refs = data.draw(st.sampled_from(owners)).sequence.arena.ref_by_block
        ref = refs[data.draw(st.sampled_from(sorted(refs)))]
        if self.arena.matches(ref):
            self.arena.damage(ref)

    # The worker

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.live))
        self.cancelled.add(one.sequence.incarnation)
        self.rig.loop.cancel(one.sequence)

    @rule(mode=st.sampled_from(list(ResidencyMode)))
    def restart_the_worker(self, mode: ResidencyMode) -> None:
        """Its process is gone with all it knew, in the midst of an answer; the next one goes on with that."""
        self.calm_the_cold_pool()
        self.submit(1_270, 1, mode, MAX_TOKENS, 1, "")
        for _ in range(60):
            if any(one.tokens for one in self.live):
                break
            self.turn_once()
        lost, self.running = self.running, []
        self.past += lost
        self.arena.lose_the_worker()
        self.worker.close()
        self.open_worker()
        for one in lost:
            if not one.is_over and one.sequence.incarnation not in self.cancelled:
                self.go_on(one)
        self.seen["workers"] += 1

    def go_on(self, one: Running) -> None:
        request, said = one.sequence.request, one.tokens
        if len(said) == request.max_tokens:
            return  # only its end was lost: the gateway knows what to say
        resumed = replace(
            request,
            request_id=f"{request.request_id}'",
            prompt=(*request.prompt, *said),
            num_answered=request.num_answered + len(said),
            max_tokens=request.max_tokens - len(said),
        )
        running = self.rig.submit_request(resumed)
        running.sequence.arrived_s = self.clock.now
        self.running.append(running)
        self.seen["resumed answers"] += bool(said)

    # Laws

    def check_laws(self) -> None:
        super().check_laws()
        self.arena.check_laws()
        leased = {ref.arena_id for ref, count in self.arena.leases.items() if count}
        assert self.used_slots() <= leased or not self.rig.loop._inbox.is_empty, (
            "a slot that may be given away"
        )

    def used_slots(self) -> set[int]:
        """Slots that sequences read or write; a publication that was answered has left its slot already."""
        used = {
            record.slot
            for one in self.rig.loop._write_back._transfers
            if not one.published
            for record in one.records
        }
        for one in self.running:
            if one.sequence.phase is not Phase.DONE:
                arena = one.sequence.arena
                used.update([*arena.ref_by_block.values(), *arena.empty, *arena.resume_refs])
        return {ref.arena_id for ref in used}

    def drain(self) -> None:
        self.calm_the_cold_pool()
        self.rig.index.is_up, self.answers_at_once = True, True
        self.copies.is_held = False
        self.copies.catch_up()
        self.drain_loop()
        counts = self.arena.pool.counts()
        assert (counts.leased, counts.writing) == (0, 0), "the arena is not back at its baseline"
        self.running += self.past

    def check_finished(self, one: Running) -> None:
        report, request = one.report, one.sequence.request
        self.seen["finished"] += 1
        self.seen["cached prefixes"] += one.sequence.cached_tokens > 0
        assert report.decode_steps == report.full_steps + report.paged_steps + report.exact_steps
        assert report.resumed_tokens == request.num_answered
        recalls = self.recalls.get(one.sequence.incarnation, [])
        assert report.HasField("evidence_recall_mean") is bool(recalls)
        if recalls:
            assert report.evidence_recall_mean == pytest.approx(math.fsum(recalls) / len(recalls))
            assert report.evidence_recall_min == pytest.approx(min(recalls))
        if request.mode in (ResidencyMode.FULL, ResidencyMode.EXACT):
            expected = continuation(request.prompt, MAX_TOKENS)
            assert tuple(one.tokens) == expected[: len(one.tokens)]


def _sum(verdicts: Seq[tuple[int, int]]) -> tuple[int, int]:
    return sum(evidence for evidence, _ in verdicts), sum(resident for _, resident in verdicts)


def test_worker_under_stress() -> None:
    seen: Counter[str] = Counter()
    run_state_machine_as_test(
        cast(Any, lambda: StressMachine(seen)),  # its stub knows only classes
        settings=settings(max_examples=6, stateful_step_count=40, deadline=None, derandomize=True),
    )
    rare = (
        "finished",
        "audits",
        "misses",
        "evictions",
        "cached prefixes",
        "managers",
        "workers",
        "resumed answers",
    )
    assert all(seen[name] for name in rare), f"this run shows little: {seen}"
