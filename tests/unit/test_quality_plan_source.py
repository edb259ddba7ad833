"""What the quality report needs of the services: equal baselines, audits on request, figures in usage."""

import pytest

from forepage.errors import RequestError
from forepage.gateway.residency_usage import residency_usage, residency_wish
from forepage.gateway.schemas import ResidencyFields
from forepage.index.question import QuestionLimits, parse_request
from forepage.kv.geometry import V4_FLASH, KvFormat, KvGeometry
from forepage.kv.ids import BlockIdx, SequenceId
from forepage.kv.plan_source import PlanSource, baseline_choice
from forepage.kv.prefetch_plan import BlockChoice, PlanStamp, PrefetchPlan
from forepage.kv.resident_set import ResidentSet
from forepage.rpc import index_pb2, worker_pb2
from forepage.settings import WorkerSettings
from forepage.worker.report import Report, StepView
from forepage.worker.request import Request
from forepage.worker.resident_history import ResidentHistory

CHOICE = BlockChoice(tuple(map(BlockIdx, (7, 2, 9))), (0.9, 0.8, 0.7), 5)
FLASH_CONFIG = {
    "num_hidden_layers": 43,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "index_head_dim": 128,
    "sliding_window": 128,
}


def parsed(**residency: object) -> Request:
    message = worker_pb2.GenerateRequest(
        request_id="r",
        prompt_token_ids=[1],
        sampling=worker_pb2.Sampling(max_tokens=2),
        residency=worker_pb2.Residency(**residency),  # type: ignore[arg-type]
    )
    return Request.parse(message, WorkerSettings(), vocab_size=320, eos=257)


def test_memory_indexer_keeps_its_choice() -> None:
    assert baseline_choice(CHOICE, PlanSource.MEMORY_INDEXER, num_candidates=10, seed=1) is CHOICE


@pytest.mark.parametrize("source", [PlanSource.RECENCY, PlanSource.RANDOM])
def test_baselines_take_as_many_blocks_and_make_a_valid_plan(source: PlanSource) -> None:
    choice = baseline_choice(CHOICE, source, num_candidates=10, seed=4)
    assert len(set(choice.blocks)) == 3
    assert all(0 <= block < 10 for block in choice.blocks)
    stamp = PlanStamp(SequenceId("s"), 0, 0)
    plan = PrefetchPlan(stamp, choice.blocks, choice.scores, choice.num_above_threshold)
    assert plan.num_above_threshold == 5


def test_recency_takes_the_newest_candidates() -> None:
    assert baseline_choice(CHOICE, PlanSource.RECENCY, num_candidates=10, seed=0).blocks == (9, 8, 7)


def test_random_is_seeded_and_reaches_every_block() -> None:
    drawn = [
        baseline_choice(CHOICE, PlanSource.RANDOM, num_candidates=10, seed=seed).blocks for seed in range(60)
    ]
    assert drawn[0] == baseline_choice(CHOICE, PlanSource.RANDOM, num_candidates=10, seed=0).blocks
    assert {block for blocks in drawn for block in blocks} == set(range(10))


def test_baseline_of_nothing_is_nothing() -> None:
    nothing = BlockChoice((), (), 0)
    for source in PlanSource:
        assert baseline_choice(nothing, source, num_candidates=0, seed=0).blocks == ()


def test_request_asks_for_a_source_a_threshold_and_audits() -> None:
    fields = ResidencyFields(plan_source=PlanSource.RANDOM, threshold=0.25, audit=True)
    wish = residency_wish(fields)
    assert wish.plan_source == index_pb2.PLAN_SOURCE_RANDOM
    request = parsed(plan_source=wish.plan_source, threshold=wish.threshold, audit=wish.audit)
    assert (request.plan_source, request.threshold, request.audit) == (PlanSource.RANDOM, 0.25, True)


def test_request_without_them_is_served_by_the_indexer() -> None:
    assert residency_wish(ResidencyFields()) == worker_pb2.Residency()
    request = parsed()
    assert (request.plan_source, request.threshold, request.audit) == (PlanSource.MEMORY_INDEXER, None, False)


def test_threshold_out_of_range_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match=r"forepage\.threshold"):
        parsed(threshold=1.5)


@pytest.mark.parametrize(
    ("sent", "source"),
    [
        (index_pb2.PLAN_SOURCE_UNSPECIFIED, PlanSource.MEMORY_INDEXER),
        (index_pb2.PLAN_SOURCE_MEMORY_INDEXER, PlanSource.MEMORY_INDEXER),
        (index_pb2.PLAN_SOURCE_RECENCY, PlanSource.RECENCY),
        (index_pb2.PLAN_SOURCE_RANDOM, PlanSource.RANDOM),
    ],
)
def test_index_reads_the_source(sent: index_pb2.PlanSource, source: PlanSource) -> None:
    limits = QuestionLimits(16, 4096, 1, 1, 4, 1, 2, default_threshold=0.4)
    request = index_pb2.LookaheadRequest(
        predict=index_pb2.Predict(num_candidates=0, position=3, hidden=bytes(8), source=sent)
    )
    prediction = parse_request(request, limits).prediction
    assert prediction is not None
    assert prediction.source is source


def test_flash_is_the_released_geometry() -> None:
    assert KvGeometry.from_config(FLASH_CONFIG, KvFormat.FP8) == V4_FLASH


def report_of(*, audit: bool) -> worker_pb2.ResidencyReport:
    """Of one paged step with 5 of 100 blocks resident, the last two being the tail, and one audit."""
    resident = ResidentSet(pinned_from=98, num_blocks=100)
    for block in (3, 4, 50, 98, 99):
        resident.row_id_by_block[block] = resident.key_id_by_block[block] = block
    report = Report(history=ResidentHistory() if audit else None)
    tiny = KvGeometry.from_config(
        {
            "num_hidden_layers": 2,
            "compress_ratios": [0, 4],
            "head_dim": 64,
            "qk_rope_head_dim": 16,
            "index_head_dim": 32,
            "sliding_window": 128,
        },
        KvFormat.FP8,
    )
    report.add_step(StepView.of(resident, tiny, staging_blocks=0, in_flight=0, budget=8))
    report.recall.add_step(num_evidence=4, num_evidence_resident=3)
    request = parsed(mode="RESIDENCY_MODE_LOOKAHEAD", plan_source="PLAN_SOURCE_RECENCY", audit=audit)
    return report.message(
        request,
        final_mode=worker_pb2.RESIDENCY_MODE_LOOKAHEAD,
        full_by_size=False,
        full_by_room=False,
        budget=8,
        slack=4,
        num_layers=1,
    )


def test_usage_prices_the_resident_set_at_flash_and_names_the_source() -> None:
    usage = residency_usage(report_of(audit=True))
    held = V4_FLASH.kv_bytes(num_tokens=25_600, row_blocks=5, key_blocks=5)
    full = V4_FLASH.kv_bytes(num_tokens=25_600, row_blocks=100, key_blocks=100)
    assert usage["footprint_flash"] == pytest.approx(held / full, rel=1e-5)
    assert usage["plan_source"] == "recency"
    assert usage["chosen_blocks_mean"] == 3.0
    assert usage["evidence_recall_steps"] == [0.75]
    assert usage["resident_block_idx"] == usage["resident_set_block_idx"] == [3, 4, 50, 98, 99]
    assert (usage["resident_set_step"], usage["resident_set_size"]) == ([1], [5])


def test_usage_lists_steps_and_blocks_only_when_audits_were_asked() -> None:
    usage = residency_usage(report_of(audit=False))
    assert usage["evidence_recall_steps"] == []
    assert usage["resident_block_idx"] == []
    assert usage["evidence_recall_mean"] == 0.75
