"""Lookahead that is audited on request: everything is looked at, nothing is done about it."""

from dataclasses import replace

from forepage.kv.plan_source import PlanSource
from forepage.rpc import index_pb2
from forepage.rpc import worker_pb2 as pb
from forepage.settings import ResidencyMode
from forepage.worker.request import Request
from forepage.worker.sampler import Sampling
from rigs.worker import plan_reply, text_tokens, worker_rig

REQUEST = Request(
    request_id="r",
    prompt=tuple(text_tokens(2_400)),
    sampling=Sampling(0.0, 1.0, 0, 0.0, 0),
    max_tokens=60,
    stop_token_ids=frozenset(),
    mode=ResidencyMode.LOOKAHEAD,
    min_recall=0.95,
    budget_blocks=2,
    cache_salt="",
)


def served(request: Request) -> tuple[pb.ResidencyReport, list[index_pb2.LookaheadRequest]]:
    """Its report and the questions it led to; the index always wants blocks 1 and 3, audits see half."""
    with worker_rig() as rig:
        rig.index.auto = lambda question: plan_reply(question, [1, 3], recall=0.5, missing=[2])
        running = rig.submit_request(request)
        rig.run(running)
        rig.check_baseline()
        return running.report, rig.index.questions


def test_audited_lookahead_reports_every_step_and_never_escalates() -> None:
    report, questions = served(replace(REQUEST, audit=True))
    assert any(question.audits for question in questions)
    assert len(report.evidence_recall_steps) == report.audited_steps > 0
    assert set(report.evidence_recall_steps) == {0.5}
    assert (report.escalations, report.moves_to_exact) == (0, 0)
    assert report.mode_final == pb.RESIDENCY_MODE_LOOKAHEAD
    assert {1, 3} < set(report.resident_block_idx)
    assert 2 not in report.resident_block_idx
    assert report.chosen_blocks_mean == 2.0
    assert 0.0 < report.footprint_flash < 1.0


def test_lookahead_is_not_audited_by_itself() -> None:
    report, questions = served(REQUEST)
    assert not any(question.audits for question in questions)
    assert report.audited_steps == 0


def test_source_and_threshold_reach_the_index() -> None:
    report, questions = served(replace(REQUEST, plan_source=PlanSource.RECENCY, threshold=0.25))
    asked = [question.predict for question in questions if question.HasField("predict")]
    assert {one.source for one in asked} == {index_pb2.PLAN_SOURCE_RECENCY}
    assert {one.threshold for one in asked} == {0.25}
    assert report.plan_source == index_pb2.PLAN_SOURCE_RECENCY


def test_threshold_is_the_indexs_own_unless_asked() -> None:
    _, questions = served(REQUEST)
    assert not any(question.predict.HasField("threshold") for question in questions)
