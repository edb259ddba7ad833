"""The worker's loop, turn by turn: what it promises in every mode, and when its peers fail."""

from collections.abc import Callable

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from forepage.coldpool.client import SlotRef
from forepage.rpc import index_pb2
from forepage.rpc import worker_pb2 as pb
from forepage.settings import ResidencyMode, WeightDtype
from forepage.telemetry import MetricName
from forepage.worker.sampler import Sampling
from forepage.worker.sequence import Phase
from rigs.gateways import data_points
from rigs.worker import Running, WorkerRig, plan_reply, text_tokens, worker_rig

PROMPT = text_tokens(2_100)
LONG = text_tokens(4_200)
FULL, LOOKAHEAD, GUARDED, EXACT = ResidencyMode.FULL, *list(ResidencyMode)[1:3], ResidencyMode.EXACT
Policy = Callable[[index_pb2.LookaheadRequest], index_pb2.LookaheadReply]


def answering(**how: object) -> Policy:
    """An index that always wants blocks 1 and 3."""
    return lambda request: plan_reply(request, [1, 3], **how)  # type: ignore[arg-type]


def tokens_of(rig: WorkerRig, mode: ResidencyMode, **how: object) -> Running:
    running = rig.submit(PROMPT, mode=mode, **how)  # type: ignore[arg-type]
    rig.run(running)
    return running


@pytest.mark.parametrize(
    ("key_format", "weight_dtype"),
    [("fp8", WeightDtype.FP32), ("mxfp4", WeightDtype.FP32), ("fp8", WeightDtype.BF16)],
)
def test_exact_gives_the_tokens_of_full_and_pulls_rows(key_format: str, weight_dtype: WeightDtype) -> None:
    with worker_rig(key_format=key_format, weight_dtype=weight_dtype) as rig:
        rig.index.auto = answering()
        full = tokens_of(rig, FULL, max_tokens=40, salt="a")
        exact = tokens_of(rig, EXACT, max_tokens=40, salt="b")
        assert exact.tokens == full.tokens
        assert exact.report.demand_bytes > 0
        assert exact.report.exact_steps == 39
        rig.check_baseline()


def test_exact_gives_the_tokens_of_full_when_sampling() -> None:
    how = Sampling(temperature=1.0, top_p=0.9, top_k=50, min_p=0.0, seed=11)
    with worker_rig() as rig:
        rig.index.auto = answering()
        full = tokens_of(rig, FULL, max_tokens=40, salt="a", sampling=how)
        exact = tokens_of(rig, EXACT, max_tokens=40, salt="b", sampling=how)
        assert exact.tokens == full.tokens


def test_sequences_decoded_together_give_the_tokens_they_give_alone() -> None:
    modes = (FULL, EXACT, FULL)
    prompts = [text_tokens(count, seed) for seed, count in enumerate((1_500, 2_100, 700))]
    with worker_rig() as rig:
        rig.index.auto = answering()
        alone = []
        for prompt, mode in zip(prompts, modes, strict=True):
            running = rig.submit(prompt, mode=mode, max_tokens=30, salt="alone")
            rig.run(running)
            alone.append(running.tokens)
        together = [
            rig.submit(prompt, mode=mode, max_tokens=30, salt="together", name=str(place))
            for place, (prompt, mode) in enumerate(zip(prompts, modes, strict=True))
        ]
        rig.run(*together)
        assert [running.tokens for running in together] == alone
        rig.check_baseline()


def test_a_short_prompt_is_kept_full_and_says_so() -> None:
    with worker_rig() as rig:
        rig.index.auto = answering()
        running = rig.submit(text_tokens(700), mode=GUARDED, budget_blocks=8)
        rig.run(running)
        assert running.report.full_by_size
        assert running.report.full_steps == running.report.decode_steps == 7
        assert rig.index.questions == [], "nothing to ask"


def test_lookahead_holds_what_the_plan_wants_and_the_tail() -> None:
    with worker_rig() as rig:
        rig.index.auto = answering()
        running = rig.submit(PROMPT, mode=LOOKAHEAD, max_tokens=20)
        rig.run_until(lambda: len(running.tokens) >= 5)
        resident = running.sequence.resident
        assert resident.chosen == [1, 3]
        assert sorted(resident.row_id_by_block) == [1, 3, *range(resident.pinned_from, resident.num_blocks)]
        assert resident.row_id_by_block.keys() == resident.key_id_by_block.keys()
        rig.run(running)
        assert running.report.paged_steps == 19
        assert running.report.kv_footprint < 1


def test_second_request_resumes_at_the_prompts_last_block() -> None:
    with worker_rig() as rig:
        first = tokens_of(rig, FULL)
        second = tokens_of(rig, FULL)
        assert first.finished is not None
        assert second.finished is not None
        assert (first.finished.cached_tokens, second.finished.cached_tokens) == (0, 2_048)
        assert second.tokens == first.tokens


def test_a_turn_decoded_clean_serves_the_next_and_a_paged_one_does_not() -> None:
    with worker_rig() as rig:
        rig.index.auto = answering()
        for mode, reused in ((FULL, True), (LOOKAHEAD, False)):
            salt = mode.value
            turn = rig.submit(PROMPT, mode=mode, max_tokens=520, salt=salt)
            rig.run(turn)
            follow = rig.submit([*PROMPT, *turn.tokens, 65, 66], mode=FULL, salt=salt)
            rig.run(follow)
            assert follow.finished is not None
            assert (follow.finished.cached_tokens > len(PROMPT)) is reused
        rig.check_baseline()


def test_a_plan_of_an_older_interval_is_discarded() -> None:
    with worker_rig() as rig:
        running = rig.submit(PROMPT, mode=LOOKAHEAD, max_tokens=60)
        rig.run_until(lambda: bool(rig.index.questions))
        rig.index.answer(plan_reply(rig.index.questions[0], [1, 3]))
        rig.run_until(lambda: len(rig.index.questions) >= 3)
        stale, newest = rig.index.questions[1:3]
        rig.index.answer(plan_reply(stale, [0, 2]))
        rig.index.answer(plan_reply(newest, [2, 4]))
        rig.run_until(lambda: running.sequence.resident.chosen != [1, 3])
        assert running.sequence.resident.chosen == [2, 4]
        rig.run(running)
        assert running.report.discarded_plans == 1
        assert running.report.late_plans >= 1


def test_late_plans_never_stop_the_decode_and_the_last_set_stays() -> None:
    with worker_rig() as rig:
        running = rig.submit(PROMPT, mode=LOOKAHEAD, max_tokens=60)
        rig.run_until(lambda: bool(rig.index.questions))
        rig.index.answer(plan_reply(rig.index.questions[0], [1, 3]))
        rig.run_until(lambda: len(running.tokens) > 50)
        assert running.sequence.resident.chosen == [1, 3]
        rig.run(running)
        assert running.report.late_plans >= 2


def test_no_index_at_the_first_plan_keeps_the_newest_blocks() -> None:
    with worker_rig() as rig:
        rig.index.is_up = False
        running = rig.submit(PROMPT, mode=LOOKAHEAD, max_tokens=40)
        rig.run_until(lambda: len(running.tokens) > 3)
        resident = running.sequence.resident
        assert resident.chosen == [resident.pinned_from - 2, resident.pinned_from - 1]
        rig.run(running)
        assert running.report.index_down_intervals == running.report.intervals >= 2


def test_the_worker_audits_itself_while_the_index_is_down() -> None:
    """And agrees with the index's own code, which reads the same arena."""
    with worker_rig(random_audits=2) as rig:
        rig.index.is_up = False
        running = rig.submit(PROMPT, mode=GUARDED, max_tokens=40)
        rig.run(running)
        report = running.report
        assert report.worker_audits > 0
        assert report.audited_steps == report.worker_audits
        assert report.evidence_recall_mean < 0.95
        assert report.moves_to_exact == 1


def test_guarded_loads_what_was_missed_then_moves_to_exact() -> None:
    with worker_rig() as rig:
        rig.index.auto = lambda request: plan_reply(request, [1, 3], recall=0.5, missing=[5])
        running = rig.submit(PROMPT, mode=GUARDED, max_tokens=100, budget_blocks=2)
        rig.run_until(lambda: running.sequence.guard.raised and running.sequence.lookahead.load is None)
        rig.run_until(lambda: not running.sequence.lookahead.repair_due)
        rig.run_until(lambda: running.sequence.lookahead.load is None)
        assert 5 in running.sequence.resident.chosen
        rig.run(running)
        report = running.report
        assert report.escalations == 2
        assert report.moves_to_exact == 1
        assert report.mode_final == pb.RESIDENCY_MODE_EXACT
        assert report.tokens_before_escalation > 0
        assert report.evidence_recall_mean == pytest.approx(0.5)
        rig.check_baseline()


def test_guarded_steps_back_after_clean_intervals() -> None:
    """In exact the audit asks what paging would have missed; here the rows wanted are all resident."""
    with worker_rig(clean_intervals=1) as rig:
        rig.index.auto = lambda request: plan_reply(request, range(8), recall=1.0)
        running = rig.submit(PROMPT, mode=GUARDED, max_tokens=120, budget_blocks=5)
        rig.run_until(lambda: len(running.tokens) > 20)
        running.sequence.guard = running.sequence.guard.to_exact()
        running.sequence.lookahead.want_exact = True
        rig.run_until(lambda: bool(running.sequence.holds.staging_ids))
        assert running.sequence.resident.keys_complete
        rig.run(running)
        rig.check_baseline()


def test_a_repair_never_drives_out_what_was_held() -> None:
    """Where evidence is missing everywhere the raised budget must not fill with it alone."""
    with worker_rig() as rig:
        rig.index.auto = lambda request: plan_reply(request, [1, 3], recall=0.5, missing=[0, 2, 4, 5, 6])
        running = rig.submit(LONG, mode=GUARDED, max_tokens=200, budget_blocks=2)
        rig.run_until(lambda: running.sequence.report.escalations == 1)
        rig.run_until(lambda: running.sequence.lookahead.repair_since is None)
        assert set(running.sequence.resident.chosen) == {1, 3, 0, 2}
        rig.run(running)
        rig.check_baseline()


def test_no_room_to_escalate_pauses_and_ends_in_a_typed_error() -> None:
    with worker_rig(escalation_reserve_bytes=0, admission_timeout_s=0.3, first_plan_timeout_ms=60_000) as rig:
        rig.index.auto = lambda request: (
            None if request.stamp.sequence_id == "other" else plan_reply(request, [1, 3], recall=0.0)
        )
        other = rig.submit(PROMPT, mode=LOOKAHEAD, name="other")  # waits for its first plan meanwhile
        rig.run_until(lambda: other.sequence.lookahead.question is not None)
        running = rig.submit(LONG, mode=GUARDED, max_tokens=200)
        rig.run_until(lambda: len(running.tokens) > 3)
        rest = rig.parts.blocks.keys.total - rig.parts.blocks.keys.promised
        assert rig.parts.blocks.keys.try_promise(rest)
        rig.run_until(lambda: running.sequence.phase is Phase.PAUSED)
        rig.run_until(lambda: running.is_over)
        assert running.failed is not None
        assert running.failed.code == "capacity_exhausted"
        assert running.failed.retry_after_s > 0
        rig.parts.blocks.keys.try_promise(-rest)
        rig.loop.cancel(other.sequence)
        rig.run_until(lambda: rig.loop.num_sequences == 0)
        rig.check_baseline()


def test_a_paused_sequence_goes_on_exactly_when_there_is_room() -> None:
    """Its copy in the arena stays its own meanwhile, and it is from there that it goes on."""
    metrics = InMemoryMetricReader()
    with worker_rig(escalation_reserve_bytes=0, metrics=metrics) as rig:
        rig.index.auto = lambda request: plan_reply(request, [1, 3], recall=0.0)
        running = rig.submit(LONG, mode=GUARDED, max_tokens=100)
        rig.run_until(lambda: len(running.tokens) > 3)
        rest = rig.parts.blocks.keys.total - rig.parts.blocks.keys.promised
        assert rig.parts.blocks.keys.try_promise(rest)
        rig.run_until(lambda: running.sequence.phase is Phase.PAUSED)
        resident = running.sequence.resident
        absent = set(range(resident.num_blocks)) - resident.row_id_by_block.keys()
        refs = [running.sequence.arena.ref_by_block[idx] for idx in absent]
        assert refs
        assert all(rig.arena.leases[ref] for ref in refs)
        rig.parts.blocks.keys.try_promise(-rest)
        rig.run(running)
        (prefilled,) = data_points(metrics, MetricName.PREFILL_TOKENS)
        assert prefilled.value == len(LONG), "nothing was computed again"
        assert running.report.exact_steps > 0
        rig.check_baseline()


def test_a_record_that_changes_under_a_load_is_never_used() -> None:
    with worker_rig() as rig:
        running = rig.submit(PROMPT, mode=LOOKAHEAD, max_tokens=100)
        rig.run_until(lambda: bool(rig.index.questions))
        rig.index.answer(plan_reply(rig.index.questions[0], [1, 3]))
        rig.run_until(lambda: len(rig.index.questions) >= 2)
        ref: SlotRef = running.sequence.arena.ref_by_block[5]
        rig.arena.lost.add(ref)
        rig.index.answer(plan_reply(rig.index.questions[1], [5, 1]))
        rig.run_until(lambda: running.is_over)
        assert running.failed is not None
        assert running.failed.code == "dependency_unavailable"
        assert "5" in running.failed.message
        rig.run_until(lambda: rig.loop.num_sequences == 0)
        rig.check_baseline()


@pytest.mark.parametrize("tokens_first", [0, 1, 30])
def test_cancelling_gives_everything_back(tokens_first: int) -> None:
    with worker_rig() as rig:
        rig.index.auto = answering()
        running = rig.submit(PROMPT, mode=GUARDED, max_tokens=200)
        rig.run_until(lambda: len(running.tokens) >= tokens_first)
        rig.loop.cancel(running.sequence)
        rig.run_until(lambda: rig.loop.num_sequences == 0)
        rig.check_baseline()


def test_cold_pool_down_admits_nobody_and_live_sequences_go_on() -> None:
    with worker_rig(admission_timeout_s=0.4) as rig:
        rig.index.auto = answering()
        live = rig.submit(PROMPT, mode=LOOKAHEAD, max_tokens=60, name="live")
        rig.run_until(lambda: len(live.tokens) > 3)
        rig.arena.is_down = True
        late = rig.submit(PROMPT, max_tokens=4, name="late")
        rig.run_until(lambda: late.is_over and len(live.tokens) > 40)
        assert late.failed is not None
        assert late.failed.code == "dependency_unavailable"
        rig.arena.is_down = False
        rig.run(live)
        assert live.finished is not None
        rig.check_baseline()


def test_a_full_device_makes_requests_wait_their_turn() -> None:
    with worker_rig(max_running=1) as rig:
        running = [rig.submit(text_tokens(600, seed), max_tokens=5, name=str(seed)) for seed in range(3)]
        rig.run(*running)
        assert all(one.finished for one in running)
        rig.check_baseline()


def test_a_request_that_can_never_fit_is_refused_at_once() -> None:
    with worker_rig(kv_bytes=1 << 20) as rig:
        running = rig.submit(text_tokens(8_000), max_tokens=4)
        rig.run_until(lambda: running.is_over)
        assert running.failed is not None
        assert running.failed.code == "context_length_exceeded"
        assert "raise" in running.failed.message
        rig.check_baseline()


def test_a_full_queue_refuses_with_retry_after() -> None:
    with worker_rig(max_running=1, max_waiting=2) as rig:
        running = [rig.submit(text_tokens(300, seed), max_tokens=4, name=str(seed)) for seed in range(5)]
        rig.run(*running)
        refused = [one for one in running if one.failed is not None]
        assert refused
        assert {one.failed.code for one in refused if one.failed} == {"rate_limit_exceeded"}
        rig.check_baseline()
