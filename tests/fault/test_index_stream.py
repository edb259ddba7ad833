"""The index's stream under bad, slow and abandoned questions: each gets one reply, the stream goes on."""

from pathlib import Path

import pytest
from opentelemetry.trace import SpanKind

from forepage.coldpool.records import SlotRef
from forepage.index.servicer import SCORING_THREADS
from forepage.rpc import index_pb2 as pb
from forepage.telemetry import Attr, MetricName, SpanName
from rigs.index_stream import asking, question, serving_index, until
from rigs.key_arena import KeyArena

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def made(tmp_path: Path) -> KeyArena:
    return KeyArena.create(tmp_path / "arena", num_slots=5)


@pytest.fixture
def refs(made: KeyArena) -> list[SlotRef]:
    return [made.complete(slot) for slot in range(5)]


async def test_answer_has_plan_audit_span_and_metrics(made: KeyArena, refs: list[SlotRef]) -> None:
    async with serving_index(made.arena.path) as index, asking(index.address) as asker:
        reply = await asker.ask(question(7, refs, audited=True, traceparent=TRACE))
        assert reply.error_code == ""
        assert (reply.stamp.sequence_id, reply.stamp.interval) == ("s", 4)
        assert len(reply.plan.block_idx) == 2
        assert (reply.plan.num_scored, reply.plan.num_above_threshold) == (5, 5)
        assert list(reply.plan.score) == sorted(reply.plan.score, reverse=True)
        assert (reply.audits[0].layer_idx, reply.audits[0].num_unread) == (1, 0)
        assert reply.audits[0].missed_mass == pytest.approx(1.0)
        (span,) = index.exporter.get_finished_spans()
        assert (span.name, span.kind) == (SpanName.INDEX_LOOKAHEAD, SpanKind.SERVER)
        assert span.parent is not None
        assert f"{span.parent.trace_id:032x}-{span.parent.span_id:016x}" == TRACE[3:52]
        assert span.attributes is not None
        assert span.attributes[Attr.DESIRED_BLOCKS] == 2
        assert [point.value for point in index.metric(MetricName.PREDICTIONS)] == [1]
        assert [point.attributes[Attr.OUTCOME] for point in index.metric(MetricName.INDEX_LATENCY)] == ["ok"]


async def test_malformed_question_gets_an_error_and_the_stream_goes_on(
    made: KeyArena, refs: list[SlotRef]
) -> None:
    async with serving_index(made.arena.path) as index, asking(index.address) as asker:
        bad = question(1, refs)
        bad.predict.hidden = bad.predict.hidden[:-4]
        reply = await asker.ask(bad)
        assert reply.error_code == "invalid_request_error"
        assert reply.error_message.startswith("predict.hidden: 383 values")
        assert not reply.HasField("plan")
        assert (await asker.ask(pb.LookaheadRequest(request_id=2))).error_code == "invalid_request_error"
        assert (await asker.ask(question(3, refs))).error_code == ""


async def test_defect_is_answered_as_ours_and_the_stream_goes_on(made: KeyArena, refs: list[SlotRef]) -> None:
    async with serving_index(made.arena.path) as index, asking(index.address) as asker:
        index.planner.fails = True
        reply = await asker.ask(question(1, refs))
        assert reply.error_code == "internal_error"
        assert "a defect" not in reply.error_message
        index.planner.fails = False
        assert (await asker.ask(question(2, refs))).error_code == ""


async def test_replies_come_as_they_finish(made: KeyArena, refs: list[SlotRef]) -> None:
    async with serving_index(made.arena.path) as index, asking(index.address) as asker:
        await asker.send(question(1, refs, sequence="held"))
        await asker.ask(question(2, refs))
        index.planner.release.set()
        await asker.reply(1)
        assert asker.order == [2, 1]


async def test_late_question_is_told_so_while_it_is_worked_on(made: KeyArena, refs: list[SlotRef]) -> None:
    async with serving_index(made.arena.path) as index, asking(index.address) as asker:
        reply = await asker.ask(question(1, refs, sequence="held", deadline_ms=40))
        assert reply.error_code == "deadline_exceeded"
        assert index.planner.num_ended == 0
        index.planner.release.set()
        assert (await asker.ask(question(2, refs))).error_code == ""


async def test_late_question_is_told_so_while_it_waits_for_a_thread(
    made: KeyArena, refs: list[SlotRef]
) -> None:
    async with serving_index(made.arena.path) as index, asking(index.address) as asker:
        for request_id in range(SCORING_THREADS):
            await asker.send(question(request_id, refs, sequence="held"))
        await until(lambda: index.planner.num_started == SCORING_THREADS)
        assert (await asker.ask(question(50, refs, deadline_ms=30))).error_code == "deadline_exceeded"
        assert index.planner.num_started == SCORING_THREADS
        index.planner.release.set()
        assert (await asker.ask(question(51, refs))).error_code == ""


async def test_no_more_than_max_inflight_are_worked_on(made: KeyArena, refs: list[SlotRef]) -> None:
    async with serving_index(made.arena.path, max_inflight=2) as index, asking(index.address) as asker:
        for request_id in range(8):
            await asker.send(question(request_id, refs, sequence=f"held-{request_id}"))
        await until(lambda: index.planner.num_started == 2)
        index.planner.release.set()
        for request_id in range(8):
            assert (await asker.reply(request_id)).error_code == ""
        assert index.planner.most_at_once == 2


async def test_abandoned_stream_harms_no_other(
    made: KeyArena, refs: list[SlotRef], caplog: pytest.LogCaptureFixture
) -> None:
    async with serving_index(made.arena.path) as index:
        async with asking(index.address) as gone:
            await gone.send(question(1, refs, sequence="held"))
            await gone.send(question(2, refs, sequence="held"))
            await until(lambda: index.planner.num_started == 2)
        async with asking(index.address) as asker:
            assert (await asker.ask(question(3, refs))).error_code == ""
            index.planner.release.set()
            await until(lambda: index.planner.num_ended == 3)
            assert (await asker.ask(question(4, refs))).error_code == ""
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


async def test_drain_answers_what_was_read_and_ends_the_stream(made: KeyArena, refs: list[SlotRef]) -> None:
    async with serving_index(made.arena.path) as index, asking(index.address) as asker:
        await asker.send(question(1, refs, sequence="held"))
        await until(lambda: index.planner.num_started == 1)
        index.servicer.drain()
        index.planner.release.set()
        assert (await asker.reply(1)).error_code == ""
        assert await asker.ended()
