"""How long paging kept sequences from decoding, and how many steps a plan took from boundary to commit."""

from functools import partial

from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from forepage.rpc import index_pb2
from forepage.settings import ResidencyMode
from forepage.telemetry import Attr, MetricName
from forepage.worker.sequence import Phase
from forepage.worker.stalls import Stall, Stalls, stall_of
from rigs.gateways import data_points
from rigs.worker import WorkerRig, decode_until, plan_reply, text_tokens, wants, worker_rig

PROMPT = text_tokens(2_100)
INTERVAL = 16


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def stalled_s(metrics: InMemoryMetricReader) -> dict[str, float]:
    points = data_points(metrics, MetricName.STALLED)
    return {str(point.attributes[Attr.REASON]): point.value for point in points}


def asks(rig: WorkerRig, interval: int) -> bool:
    return any(question.stamp.interval == interval for question in rig.index.questions)


def answer_predictions(rig: WorkerRig, *blocks: int) -> None:
    """Plans for what has been asked and not answered yet."""
    for question in rig.index.questions:
        rig.index.answer(plan_reply(question, blocks))
    rig.index.questions.clear()


def test_time_counts_for_those_that_were_stalled_when_it_began() -> None:
    metrics, clock = InMemoryMetricReader(), Clock()
    with worker_rig(metrics=metrics, first_plan_timeout_ms=600_000) as rig:
        running = rig.submit(PROMPT, mode=ResidencyMode.LOOKAHEAD, max_tokens=20)
        sequence = running.sequence
        stalls = Stalls(rig.parts.telemetry, clock)
        rig.run_until(lambda: bool(rig.index.questions))
        assert sequence.phase is Phase.FIRST_PLAN
        before_ms = sequence.report.stalled_ms
        for seconds, phase, reason in (
            (1.0, Phase.FIRST_PLAN, Stall.FIRST_PLAN),
            (2.0, Phase.PAUSED, Stall.ROOM),
            (4.0, Phase.DECODE, None),
            (8.0, Phase.PREFILL, None),
        ):
            sequence.phase = phase
            assert stall_of(sequence) is reason
            stalls.tick([sequence])
            clock.now_s += seconds
        stalls.tick([])
        sequence.phase = Phase.FIRST_PLAN
        assert sequence.report.stalled_ms - before_ms == 3_000.0
        answer_predictions(rig, 1, 3)
        rig.index.auto = wants(1, 3)
        rig.run(running)
        seen = stalled_s(metrics)
        assert seen["room"] == 2.0
        assert seen["first_plan"] > 1.0, "the loop counts too, by a real clock"
        assert running.report.stalled_ms >= 3_000


def test_a_wait_for_the_first_plan_is_in_the_answers_report() -> None:
    with worker_rig(first_plan_timeout_ms=50) as rig:
        running = rig.submit(PROMPT, mode=ResidencyMode.LOOKAHEAD, max_tokens=4)
        rig.run(running)
        assert running.report.stalled_ms >= 49
        full = rig.submit(PROMPT, mode=ResidencyMode.FULL, max_tokens=4, salt="full")
        rig.run(full)
        assert full.report.stalled_ms == 0


def test_steps_are_counted_from_the_boundary_to_the_commit() -> None:
    metrics = InMemoryMetricReader()
    with worker_rig(metrics=metrics, interval_steps=INTERVAL) as rig:
        running = rig.submit(PROMPT, mode=ResidencyMode.LOOKAHEAD, max_tokens=3 * INTERVAL)
        late_by = 5

        def first_only(question: index_pb2.LookaheadRequest) -> index_pb2.LookaheadReply | None:
            return plan_reply(question, (1, 3)) if question.stamp.interval == 0 else None

        rig.index.auto = first_only
        for interval in (1, 2):
            rig.run_until(partial(asks, rig, interval), in_step=True)
            boundary = running.sequence.num_processed
            decode_until(rig, running, boundary - len(PROMPT) + late_by + 1)
            answer_predictions(rig, 1, 3 + interval)
        rig.run_until(lambda: running.is_over, in_step=True)
        rig.run(running)
        points = data_points(metrics, MetricName.COMMIT_STEPS)
        assert [point.count for point in points] == [2], "the first plan follows no boundary"
        # the load is started in the turn that brings the plan, and committed one step later
        assert points[0].min == points[0].max == late_by + 1
        assert running.report.commit_steps_mean == running.report.commit_steps_max == late_by + 1


def test_full_has_no_steps_to_report() -> None:
    with worker_rig() as rig:
        running = rig.submit(PROMPT, mode=ResidencyMode.FULL, max_tokens=4)
        decode_until(rig, running, 2)
        rig.run(running)
        assert not running.report.HasField("commit_steps_max")
