"""Faults that the worker's loop must survive: each test is one that it once did not."""

from concurrent.futures import Future
from typing import Any

import pytest
import torch

from forepage.errors import RequestError
from forepage.kv.ids import BlockIdx
from forepage.kv.prefetch_plan import LoadWave, fit_waves
from forepage.settings import OnIndexDown, ResidencyMode
from forepage.worker.copy_engine import CopyEngine
from forepage.worker.quota import held_quota
from forepage.worker.sequence import Phase
from rigs.worker import Running, WorkerRig, decode_until, plan_reply, text_tokens, wants, worker_rig

PROMPT = text_tokens(1_300)
FULL, LOOKAHEAD, GUARDED, EXACT = ResidencyMode.FULL, *list(ResidencyMode)[1:3], ResidencyMode.EXACT


def check_promises(rig: WorkerRig, *running: Running) -> None:
    """Each sequence holds no more than it was promised itself: nobody lives on another's promise."""
    for one in running:
        if (holds := one.sequence.device) is not None:
            held = held_quota(rig.parts, one.sequence)
            assert held.rows <= holds.row_promise
            assert held.keys <= holds.key_promise


def test_an_index_that_never_answers_does_not_hold_the_first_step_back() -> None:
    with worker_rig(first_plan_timeout_ms=30) as rig:
        running = rig.submit(PROMPT, mode=LOOKAHEAD, max_tokens=3)
        rig.run(running)
        assert running.finished is not None
        assert running.report.chosen_blocks_max == 2, "the newest ones"
        rig.check_baseline()


def test_an_index_lost_during_the_first_question_leaves_a_set_within_the_budget() -> None:
    with worker_rig() as rig:
        running = rig.submit(PROMPT, mode=LOOKAHEAD, max_tokens=3)
        rig.run_until(lambda: bool(rig.index.questions))
        rig.loop.index_down()
        rig.run(running)
        assert running.report.paged_steps == 2
        assert running.report.resident_blocks_max < rig.parts.geometry.num_blocks(len(PROMPT))
        rig.check_baseline()


def test_an_index_lost_during_the_first_question_claims_nothing_before_exact_is_granted() -> None:
    with worker_rig(on_index_down=OnIndexDown.EXACT, recent_tokens=256, load_slack_blocks=1) as rig:
        running = rig.submit(PROMPT, mode=GUARDED, max_tokens=14, budget_blocks=1)
        rig.run_until(lambda: bool(rig.index.questions))
        rig.loop.index_down()
        while not running.is_over:
            with torch.inference_mode():
                rig.loop.turn()
            check_promises(rig, running)
        assert running.report.moves_to_exact == 1
        rig.run_until(lambda: rig.loop.num_sequences == 0)
        rig.check_baseline()


def test_exact_decodes_while_the_cold_pool_keeps_every_block_on_the_device() -> None:
    """Nothing was written back, so nothing may be dropped: the staging must still have been promised."""
    with worker_rig(load_slack_blocks=1, first_plan_timeout_ms=30) as rig:
        rig.index.auto = wants(1)
        running = rig.submit(text_tokens(2_300), mode=EXACT, max_tokens=4, budget_blocks=1)
        rig.run_until(lambda: running.sequence.phase is Phase.PREFILL)
        rig.arena.is_down = True
        rig.run_until(lambda: running.sequence.phase is Phase.DECODE or running.is_over)
        check_promises(rig, running)
        rig.run(running)
        assert running.finished is not None
        rig.check_baseline()


def start_with_a_stuck_tail(rig: WorkerRig, num_tokens: int) -> Running:
    """The cold pool goes away when half of the prompt is written back: the other half is pinned."""
    running = rig.submit(text_tokens(num_tokens), mode=LOOKAHEAD, max_tokens=60)
    rig.run_until(lambda: running.sequence.arena.num_leading >= 4)
    rig.arena.is_down = True
    decode_until(rig, running, 2)
    return running


def test_a_plan_never_loads_beyond_what_the_sequence_was_promised() -> None:
    with worker_rig(load_slack_blocks=2, interval_steps=4, first_plan_timeout_ms=200) as rig:
        rig.index.auto = wants(1, 3)
        running = start_with_a_stuck_tail(rig, 4_200)
        rig.index.auto = wants(0, 2)
        check_promises(rig, running)
        for target in range(4, 24):
            decode_until(rig, running, target)
            check_promises(rig, running)
        assert running.sequence.resident.chosen == [0, 2]
        rig.arena.is_down = False
        rig.run(running)
        assert running.finished is not None
        rig.check_baseline()


def test_a_tail_that_could_not_grow_goes_on_when_the_cold_pool_is_back() -> None:
    with worker_rig(load_slack_blocks=1, interval_steps=64, first_plan_timeout_ms=200) as rig:
        rig.index.auto = wants(1, 3)
        running = start_with_a_stuck_tail(rig, 4_346)
        holds = running.sequence.holds
        rows = held_quota(rig.parts, running.sequence).rows
        assert rig.parts.blocks.rows.try_promise(rows - holds.row_promise)
        holds.row_promise = rows
        rig.run_until(lambda: running.sequence.blocked_since_s is not None)
        rig.arena.is_down = False
        rig.run(running)
        assert running.finished is not None
        rig.check_baseline()


def test_a_sequence_moves_to_exact_while_it_holds_more_than_that_needs() -> None:
    with worker_rig(
        load_slack_blocks=1,
        interval_steps=4,
        first_plan_timeout_ms=200,
        on_index_down=OnIndexDown.EXACT,
    ) as rig:
        running = rig.submit(text_tokens(2_300), mode=GUARDED, max_tokens=12, budget_blocks=1)
        rig.run_until(lambda: running.sequence.arena.num_leading >= 4)
        rig.arena.is_down, rig.index.is_up = True, False
        while not running.is_over:
            before = len(running.tokens)
            rig.run_until(lambda seen=before: running.is_over or len(running.tokens) > seen)  # type: ignore[misc]
            check_promises(rig, running)
        assert running.finished is not None
        assert running.report.exact_steps > 0
        rig.run_until(lambda: rig.loop.num_sequences == 0)
        rig.check_baseline()


def test_moving_to_exact_and_back_never_keeps_more_by_score_than_the_budget() -> None:
    """The tail moves on while keys load: blocks that leave it are not chosen until a change says so."""
    with worker_rig(clean_intervals=1, interval_steps=64) as rig:
        rig.index.auto = wants(0, 2)
        running = rig.submit(text_tokens(1_260), mode=GUARDED, max_tokens=60)
        decode_until(rig, running, 3)
        assert running.sequence.resident.pinned_from == 3
        decode_until(rig, running, 24)
        for exact in (True, False):
            running.sequence.guard = (
                running.sequence.guard.to_exact()
                if exact
                else running.sequence.guard.start(min_recall=0.95, budget_blocks=2, clean_intervals=1)
            )
            running.sequence.lookahead.want_exact = exact
            decode_until(rig, running, len(running.tokens) + 4)
            assert bool(running.sequence.holds.staging_ids) is exact
            assert len(running.sequence.resident.chosen) <= 2
        rig.run(running)


def test_a_paused_sequence_gives_its_room_to_others_and_loads_nothing() -> None:
    with worker_rig(
        escalation_reserve_bytes=0, interval_steps=4, admission_timeout_s=0.3, first_plan_timeout_ms=60_000
    ) as rig:
        rig.index.auto = lambda request: (
            None if request.stamp.sequence_id == "other" else plan_reply(request, [1, 3], recall=0.0)
        )
        other = rig.submit(PROMPT, mode=LOOKAHEAD, name="other")  # waits for its first plan meanwhile
        rig.run_until(lambda: other.sequence.lookahead.question is not None)
        running = rig.submit(text_tokens(4_200), mode=GUARDED, max_tokens=100)
        decode_until(rig, running, 2)
        keys = rig.parts.blocks.keys
        rest = keys.total - keys.promised
        assert keys.try_promise(rest)
        rig.run_until(lambda: running.sequence.phase is Phase.PAUSED)
        assert keys.promised < keys.total
        assert held_quota(rig.parts, running.sequence).keys == running.sequence.holds.key_promise
        running.sequence.lookahead.desired = [(BlockIdx(1), 0.9)]
        rig.run_until(lambda: running.sequence.lookahead.load is not None or running.is_over)
        assert running.failed is not None
        assert running.failed.code == "capacity_exhausted"
        keys.try_promise(-rest)
        rig.loop.cancel(other.sequence)
        rig.run_until(lambda: rig.loop.num_sequences == 0)
        rig.check_baseline()


def test_an_audit_of_a_step_before_the_repair_does_not_escalate_again() -> None:
    with worker_rig(interval_steps=8, random_audits=1) as rig:
        rig.index.auto = lambda request: None if request.audits else plan_reply(request, [1, 3])
        running = rig.submit(PROMPT, mode=GUARDED, max_tokens=40, budget_blocks=1)
        rig.run_until(lambda: sum(bool(question.audits) for question in rig.index.questions) >= 2)
        early, late = [question for question in rig.index.questions if question.audits][:2]
        rig.index.answer(plan_reply(late, [1, 3], recall=0.5, missing=[2]))
        rig.run_until(lambda: 2 in running.sequence.resident.chosen)
        rig.index.answer(plan_reply(early, [1, 3], recall=0.5, missing=[2]))
        rig.loop.turn()
        assert running.sequence.guard.raised
        assert not running.sequence.guard.exact
        assert running.sequence.lookahead.repair_since is None
        rig.loop.cancel(running.sequence)
        rig.run_until(lambda: rig.loop.num_sequences == 0)
        rig.check_baseline()


class HeldLoads:
    """Holds the copy engine's loads back, except while `is_open`."""

    def __init__(self, copies: CopyEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_open = True
        self._held: list[tuple[Future[None], Any]] = []
        self._load = copies.load
        monkeypatch.setattr(copies, "load", self.load)

    def load(self, loads: Any) -> Future[None]:
        if self.is_open:
            return self._load(loads)
        future: Future[None] = Future()
        self._held.append((future, loads))
        return future

    def release(self) -> None:
        self.is_open = True
        for future, loads in self._held:
            self._load(loads).result()
            future.set_result(None)


def test_a_load_that_ends_before_the_repair_began_does_not_count_as_the_repair(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with worker_rig(interval_steps=8, random_audits=0) as rig:
        loads = HeldLoads(rig.parts.device.local.copies, monkeypatch)
        rig.index.auto = lambda request: plan_reply(request, [0] if request.audits else [1])
        running = rig.submit(PROMPT, mode=GUARDED, max_tokens=60, budget_blocks=1)
        decode_until(rig, running, 2)
        loads.is_open = False
        rig.run_until(lambda: running.sequence.lookahead.load is not None)
        rig.index.auto = lambda request: plan_reply(request, [0], recall=0.5, missing=[2])
        rig.run_until(lambda: running.sequence.lookahead.repair_due)
        lookahead = running.sequence.lookahead
        since = lookahead.repair_since
        assert since is not None
        loads.release()
        rig.run_until(lambda: 2 in running.sequence.resident.chosen)
        assert running.sequence.report.tokens_before_escalation == lookahead.audits_from - since > 0
        assert running.sequence.report.escalations == 1
        rig.run(running)


def test_a_plan_overtaken_by_the_next_boundary_is_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    with worker_rig(interval_steps=4) as rig:
        loads = HeldLoads(rig.parts.device.local.copies, monkeypatch)
        rig.index.auto = wants(1, 3)
        running = rig.submit(PROMPT, mode=LOOKAHEAD, max_tokens=60)
        decode_until(rig, running, 2)
        loads.is_open = False
        rig.index.auto = wants(0, 1)
        rig.run_until(lambda: running.sequence.lookahead.load is not None)
        rig.run_until(lambda: running.sequence.lookahead.desired is not None)
        waiting = running.sequence.lookahead.question
        assert waiting is not None
        rig.run_until(lambda: running.sequence.lookahead.question is not waiting)
        assert not waiting.span.is_recording()
        assert running.sequence.report.discarded_plans == 1
        loads.release()
        rig.run(running)
        rig.check_baseline()


def test_stepping_back_is_not_decided_before_the_keys_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load of keys that outlasts intervals: what paging misses was not looked at meanwhile."""
    with worker_rig(interval_steps=4, clean_intervals=1) as rig:
        loads = HeldLoads(rig.parts.device.local.copies, monkeypatch)
        rig.index.auto = wants(1, 3)
        running = rig.submit(PROMPT, mode=GUARDED, max_tokens=40)
        decode_until(rig, running, 2)
        loads.is_open = False
        running.sequence.guard = running.sequence.guard.to_exact()
        running.sequence.lookahead.want_exact = True
        decode_until(rig, running, 20)
        assert running.sequence.guard.exact
        loads.release()
        rig.run_until(lambda: running.sequence.resident.keys_complete)
        assert running.sequence.holds.staging_ids
        rig.run(running)
        assert running.finished is not None
        rig.check_baseline()


def test_waves_are_cut_to_the_room_and_the_change_stays_the_same() -> None:
    wave = LoadWave((BlockIdx(1), BlockIdx(2), BlockIdx(3)), (BlockIdx(7),))
    last = LoadWave((BlockIdx(4),), (BlockIdx(8),))
    assert fit_waves((wave, last), 3) == (wave, last)
    cut = (LoadWave(wave.load[:2], wave.drop), LoadWave(wave.load[2:], ()), last)
    assert fit_waves((wave, last), 2) == cut
    assert fit_waves((LoadWave(wave.load, ()), last), 0) == (LoadWave((), last.drop),)


def test_scores_that_are_not_finite_end_their_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker audits itself (no index); one sequence's scores are NaN, the other goes on."""
    with worker_rig() as rig:
        rig.index.is_up = False
        bad = rig.submit(PROMPT, mode=GUARDED, max_tokens=40, name="bad")
        good = rig.submit(PROMPT, mode=LOOKAHEAD, max_tokens=40, name="good")

        def spoiled(*_: object, **__: object) -> None:
            raise RequestError("resident_scores: nan is no score")

        monkeypatch.setattr(rig.loop._auditing, "audit_here", spoiled)
        rig.run(bad, good)
        assert bad.failed is not None
        assert bad.failed.code == "internal_error", "not the caller's fault"
        assert "nan" in bad.failed.message
        assert good.finished is not None
        assert rig.loop.broken is None
        rig.check_baseline()


def test_a_lost_record_ends_the_request_before_another_token_in_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with worker_rig(interval_steps=4) as rig:
        loads = HeldLoads(rig.parts.device.local.copies, monkeypatch)
        rig.index.auto = wants(1, 3)
        running = rig.submit(PROMPT, mode=EXACT, max_tokens=60)
        decode_until(rig, running, 2)
        loads.is_open = False
        rig.index.auto = wants(0, 2)
        rig.run_until(lambda: running.sequence.lookahead.load is not None)
        rig.arena.lost.add(running.sequence.arena.ref_by_block[2])
        before = len(running.tokens)
        loads.release()
        rig.run_until(lambda: running.is_over)
        assert running.failed is not None
        assert len(running.tokens) == before
        rig.run_until(lambda: rig.loop.num_sequences == 0)
        rig.check_baseline()
