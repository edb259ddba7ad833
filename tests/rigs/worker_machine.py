"""A machine that drives a worker's loop by chance: requests, turns, faults in any order, laws at each step.

The machine drives the loop, so the order of events is the machine's own. Two things are oracles: the laws of
memory (who holds what), and the tokens of the same prompt decoded in `full` alone.
"""

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forepage.kv.resident_set import NOT_RESIDENT
from forepage.rpc import index_pb2
from forepage.settings import OnIndexDown, ResidencyMode
from forepage.worker import admission, lookahead, loop, residency, write_back
from forepage.worker.commands import Table
from forepage.worker.quota import held_quota, steady_quota
from forepage.worker.sequence import Phase, Room
from forepage.worker.watching import view_of
from rigs.watching import blocks_of
from rigs.worker import Running, WorkerRig, plan_reply, text_tokens, worker_rig

MAX_TOKENS = 14
LENGTHS = (1, 255, 256, 257, 513, 1_024, 1_270, 1_300, 1_536)
SETTINGS: dict[str, Any] = {
    "recent_tokens": 256,
    "interval_steps": 4,
    "clean_intervals": 1,
    "load_slack_blocks": 1,
    "kv_bytes": 3 << 20,
    "max_running": 3,
    "max_waiting": 3,
    "first_plan_timeout_ms": 40,
    "predict_deadline_ms": 20,
    "admission_timeout_s": 1.0,
    "escalation_reserve_bytes": 64 << 10,
}
block_lists = st.lists(st.integers(0, 9), max_size=5)
recalls = st.sampled_from([0.0, 0.5, 1.0, 1.0, 1.0])


@cache
def prompt_of(length: int, branch: int) -> tuple[int, ...]:
    """Prompts of one length share all but their last 40 tokens."""
    kept = max(0, length - 40)
    return (*text_tokens(kept, 0), *text_tokens(length - kept, 1 + branch))


@cache
def oracle(length: int, branch: int) -> tuple[int, ...]:
    """The tokens of `full`, alone and without a cache."""
    with worker_rig() as rig:
        running = rig.submit(prompt_of(length, branch), max_tokens=MAX_TOKENS)
        rig.run(running)
        return tuple(running.tokens)


class Clock:
    """Stands for `time` in the worker's modules: it moves when the machine says so."""

    def __init__(self) -> None:
        self.now = 1.0

    def monotonic(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return time.time_ns()


class HeldExecutor(Executor):
    """Stands for the copy thread: runs copies in order, at once or when the machine says so."""

    def __init__(self) -> None:
        self.is_held = False
        self._waiting: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._waiting.append((future, lambda: fn(*args, **kwargs)))
        if not self.is_held:
            self.catch_up()
        return future

    def catch_up(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future, act in waiting:
            future.set_result(act())


class WorkerMachine(RuleBasedStateMachine):
    """Requests and faults over a scripted index and an arena in memory."""

    rig_settings = SETTINGS

    def __init__(self) -> None:
        """Nothing is open yet."""
        super().__init__()
        self.stack = ExitStack()
        self.running: list[Running] = []
        self.of: dict[int, tuple[int, int]] = {}
        self.clock = Clock()
        self.copies = HeldExecutor()

    @initialize(on_down=st.sampled_from(list(OnIndexDown)))
    def start(self, on_down: OnIndexDown) -> None:
        """A worker, and one request that pages."""
        self.patch_time()
        self.rig: WorkerRig = self.stack.enter_context(worker_rig(on_index_down=on_down, **self.rig_settings))
        self.rig.parts.device.local.copies._executor = self.copies  # type: ignore[assignment]
        self.submit(1_300, 0, ResidencyMode.GUARDED, MAX_TOKENS, 1, "")

    def patch_time(self) -> None:
        """The worker's clock is the machine's."""
        patch = self.stack.enter_context(pytest.MonkeyPatch.context())
        for module in (admission, lookahead, loop, residency, write_back):
            patch.setattr(module, "time", self.clock)
        patch.setattr(loop, "IDLE_S", 0.0)
        patch.setattr(loop, "WAITING_S", 0.0)

    @property
    def live(self) -> list[Running]:
        return [one for one in self.running if not one.is_over and one.sequence.phase is not Phase.DONE]

    @rule(
        length=st.sampled_from(LENGTHS),
        branch=st.integers(0, 1),
        mode=st.sampled_from([*ResidencyMode, ResidencyMode.GUARDED, ResidencyMode.EXACT]),
        max_tokens=st.integers(1, MAX_TOKENS),
        budget=st.integers(1, 4),
        salt=st.sampled_from(["", "a"]),
    )
    def submit(
        self, length: int, branch: int, mode: ResidencyMode, max_tokens: int, budget: int, salt: str
    ) -> None:
        running = self.rig.submit(
            prompt_of(length, branch),
            mode=mode,
            max_tokens=max_tokens,
            budget_blocks=budget,
            salt=salt,
            name=str(len(self.running)),
        )
        running.sequence.arrived_s = self.clock.now
        self.of[running.sequence.incarnation] = (length, branch)
        self.running.append(running)

    @rule(times=st.integers(1, 12))
    def turn(self, times: int) -> None:
        for _ in range(times):
            self.turn_once()

    def turn_once(self) -> None:
        self.clock.now += 0.002
        with torch.inference_mode():
            self.rig.loop.turn()
        self.check_laws()

    @rule()
    def hold_the_copies(self) -> None:
        self.copies.is_held = not self.copies.is_held
        if not self.copies.is_held:
            self.copies.catch_up()

    @precondition(lambda self: self.rig.index.questions)
    @rule(data=st.data(), blocks=block_lists, recall=recalls, missing=block_lists, times=st.integers(1, 2))
    def answer(
        self, data: st.DataObject, blocks: list[int], recall: float, missing: list[int], times: int
    ) -> None:
        """Any open question: the oldest or not, once or twice; blocks out of range and named twice."""
        place = data.draw(st.integers(0, len(self.rig.index.questions) - 1))
        question = self.rig.index.questions.pop(place)
        for _ in range(times):
            self.rig.index.answer(plan_reply(question, blocks, recall=recall, missing=missing))

    @precondition(lambda self: self.rig.index.questions)
    @rule(how=st.sampled_from(["stamp", "incarnation", "evidence", "masses", "scores", "error", "more"]))
    def answer_badly(self, how: str) -> None:
        reply = plan_reply(self.rig.index.questions.pop(0), [0, 1], recall=0.5, missing=[1])
        spoil(reply, how)
        self.rig.index.answer(reply)

    @precondition(lambda self: self.rig.index.questions)
    @rule()
    def drop_a_question(self) -> None:
        self.rig.index.questions.pop(0)

    @rule(blocks=st.none() | block_lists, recall=recalls)
    def answer_by_itself(self, blocks: list[int] | None, recall: float) -> None:
        def auto(request: index_pb2.LookaheadRequest) -> index_pb2.LookaheadReply | None:
            return None if blocks is None else plan_reply(request, blocks, recall=recall, missing=[0])

        self.rig.index.auto = auto

    @rule()
    def lose_the_index(self) -> None:
        self.rig.index.is_up = not self.rig.index.is_up
        if not self.rig.index.is_up:
            self.rig.index.questions.clear()
            self.rig.loop.index_down()

    @rule()
    def lose_the_cold_pool(self) -> None:
        self.rig.arena.is_down = not self.rig.arena.is_down

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.rig.loop.cancel(data.draw(st.sampled_from(self.live)).sequence)

    @precondition(lambda self: any(one.sequence.arena.ref_by_block for one in self.live))
    @rule(data=st.data())
    def lose_a_record(self, data: st.DataObject) -> None:
        owners = [one for one in self.live if one.sequence.arena.ref_by_block]
        refs = data.draw(st.sampled_from(owners)).sequence.arena.ref_by_block
        self.rig.arena.lost.add(refs[data.draw(st.sampled_from(sorted(refs)))])

    @rule()
    def let_time_pass(self) -> None:
        self.clock.now += 0.3

    @invariant()
    def laws(self) -> None:
        if hasattr(self, "rig"):
            self.check_laws()

    def check_laws(self) -> None:
        blocks = self.rig.parts.blocks
        blocks.check_integrity()
        rows: list[int] = []
        keys: list[int] = []
        for one in self.running:
            if (holds := one.sequence.device) is None:
                continue
            load = one.sequence.lookahead.load
            rows += [*holds.resident.row_id_by_block.values(), *holds.staging_ids]
            keys += holds.resident.key_id_by_block.values()
            if load is not None:
                rows += load.row_ids.values()
                keys += load.key_ids.values()
            self.check_sequence(one)
        assert len(set(rows)) == len(rows) == blocks.rows.num_held, "a row block leaked or has two owners"
        assert len(set(keys)) == len(keys) == blocks.keys.num_held, "a key block leaked or has two owners"

    def check_sequence(self, one: Running) -> None:
        sequence, holds = one.sequence, one.sequence.holds
        if sequence.phase in (Phase.GRANTING, Phase.DONE):
            return
        resident, parts = holds.resident, self.rig.parts
        resident.check_integrity()
        absent = set(range(resident.num_blocks)) - set(resident.row_id_by_block)
        assert absent <= set(sequence.arena.ref_by_block), "dropped, and not in the arena"
        tables = parts.device.local.memory.tables
        for table, ids in (
            (tables[Table.ROWS], resident.row_table()),
            (tables[Table.KEYS], resident.key_table()),
        ):
            shown = table[holds.slot].tolist()
            assert shown[: len(ids)] == ids
            assert set(shown[len(ids) :]) <= {NOT_RESIDENT}
        self.check_view(one, tables[Table.ROWS][holds.slot].tolist())
        held = held_quota(parts, sequence)
        assert held.rows <= holds.row_promise
        assert held.keys <= holds.key_promise
        if sequence.room in (Room.KEPT, Room.LEAVING):
            assert resident.rows_complete
            assert not holds.staging_ids
        elif sequence.phase is Phase.DECODE and sequence.request.mode is not ResidencyMode.FULL:
            if sequence.room is Room.FILLING:
                return
            most = 2 * sequence.request.budget_blocks
            assert len(resident.chosen) <= (most if sequence.report.escalations else most // 2)
            loading = len(sequence.lookahead.load.row_ids) if sequence.lookahead.load else 0
            slack = parts.settings.load_slack_blocks
            assert resident.num_resident + loading <= most + resident.num_pinned + slack
        if sequence.phase is Phase.PAUSED:
            assert sequence.lookahead.load is None
            assert held.keys <= steady_quota(parts, sequence).keys

    def check_view(self, one: Running, row_table: list[int]) -> None:
        """Who watches sees what attention sees: the blocks that the device's table names."""
        view = view_of(one.sequence)
        in_table = {idx for idx, row_id in enumerate(row_table) if row_id != NOT_RESIDENT}
        assert blocks_of(view) == in_table
        assert set(view.prefetched_block_idx) <= in_table
        assert not in_table.intersection(view.loading_block_idx)
        assert all(idx < view.num_blocks for idx in (*view.missed_block_idx, *view.loading_block_idx))

    def teardown(self) -> None:
        with self.stack:
            if hasattr(self, "rig"):
                self.drain()
        for one in self.running:
            if one.finished is not None:
                self.check_finished(one)  # its oracle runs on the real clock

    def drain(self) -> None:
        rig = self.rig
        rig.arena.is_down, rig.index.is_up = False, True
        rig.index.auto = lambda request: plan_reply(request, [0, 1])
        self.copies.is_held = False
        self.copies.catch_up()
        self.drain_loop()

    def drain_loop(self) -> None:
        """Every sequence ends by itself, and nothing is left of it."""
        rig = self.rig
        for _ in range(2_000):
            self.turn_once()
            if rig.loop.num_sequences == 0:
                break
        assert rig.loop.num_sequences == 0, "stuck"
        rig.check_baseline()
        assert not rig.loop._lookahead._asked, "open questions outlive their sequences"
        for one in self.running:
            assert one.sequence.released.is_set()
            assert not one.sequence.span.is_recording()

    def check_finished(self, one: Running) -> None:
        report, mode = one.report, one.sequence.request.mode
        assert report.decode_steps == report.full_steps + report.paged_steps + report.exact_steps
        assert report.audited_steps <= report.decode_steps
        if mode in (ResidencyMode.FULL, ResidencyMode.EXACT):
            expected = oracle(*self.of[one.sequence.incarnation])
            assert tuple(one.tokens) == expected[: len(one.tokens)]


def spoil(reply: index_pb2.LookaheadReply, how: str) -> None:
    """Make the reply wrong in one way."""
    if how == "stamp":
        reply.stamp.interval += 1
    elif how == "incarnation":
        reply.stamp.incarnation ^= 1
    elif how == "error":
        reply.error_code = "dependency_unavailable"
    elif how == "scores":
        reply.plan.block_idx.append(2)
    for audit in list(reply.audits):
        if how == "evidence":
            audit.num_evidence_resident = audit.num_evidence + 1
        elif how == "masses":
            audit.missing_block_idx.append(2)
        elif how == "more":
            reply.audits.append(audit)
