"""What a worker's metrics say of hits, misses, bytes and writes, against what its sequences really did."""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.trace import Span

from forepage.coldpool.client import PublishedRecord, SlotRef
from forepage.settings import ResidencyMode
from forepage.telemetry import Attr, MetricName
from forepage.worker.gauges import observe_worker
from rigs.gateways import data_points
from rigs.worker import text_tokens, wants, worker_rig

PROMPT = text_tokens(2_100)
BLOCK_TOKENS = 256


@pytest.fixture
def metrics() -> InMemoryMetricReader:
    return InMemoryMetricReader()


def values(metrics: InMemoryMetricReader, name: MetricName, by: Attr) -> dict[Any, Any]:
    return {point.attributes[by]: point.value for point in data_points(metrics, name)}


def total(metrics: InMemoryMetricReader, name: MetricName) -> Any:
    return sum(point.value for point in data_points(metrics, name))


def test_rows_are_hits_or_misses_by_whether_they_were_pulled(metrics: InMemoryMetricReader) -> None:
    with worker_rig(metrics=metrics) as rig:
        rig.index.auto = wants(1, 3)
        running = rig.submit(PROMPT, mode=ResidencyMode.EXACT, max_tokens=40)
        rig.run(running)
        geometry, topk = rig.parts.geometry, rig.parts.topk
        assert topk < len(PROMPT) // 4
        misses = values(metrics, MetricName.CACHE_MISSES, Attr.CACHE)["rows"]
        hits = values(metrics, MetricName.CACHE_HITS, Attr.CACHE)["rows"]
        assert misses * geometry.row_bytes == running.report.demand_bytes > 0
        assert hits + misses == 39 * len(geometry.c4_layers) * topk
        assert hits > 0


def test_what_a_plan_wants_is_a_hit_where_it_is_resident(metrics: InMemoryMetricReader) -> None:
    with worker_rig(metrics=metrics) as rig:
        rig.index.auto = wants(1, 3)
        running = rig.submit(PROMPT, mode=ResidencyMode.LOOKAHEAD, max_tokens=40)
        rig.run_until(lambda: len(running.tokens) >= 3)
        rig.index.auto = wants(1, 5)  # from the next boundary on
        rig.run(running)
        hits = values(metrics, MetricName.CACHE_HITS, Attr.CACHE)["plan"]
        misses = values(metrics, MetricName.CACHE_MISSES, Attr.CACHE)["plan"]
        assert hits + misses == 2 * running.report.intervals
        assert misses == 1, "block 5, once; after prefill everything is there"


def test_a_prefix_is_a_hit_block_by_block(metrics: InMemoryMetricReader) -> None:
    with worker_rig(metrics=metrics) as rig:
        for _ in range(2):
            running = rig.submit(PROMPT, max_tokens=2)
            rig.run(running)
        blocks = -(-len(PROMPT) // BLOCK_TOKENS)
        assert running.finished is not None
        cached = running.finished.cached_tokens // BLOCK_TOKENS
        assert cached > 0
        assert values(metrics, MetricName.CACHE_HITS, Attr.CACHE)["prefix"] == cached
        assert values(metrics, MetricName.CACHE_MISSES, Attr.CACHE)["prefix"] == 2 * blocks - cached
        moved = values(metrics, MetricName.HOST_TO_DEVICE, Attr.REASON)["prefix"]
        assert moved == cached * rig.parts.geometry.record_bytes


def test_bytes_from_the_host_are_all_there_by_reason(metrics: InMemoryMetricReader) -> None:
    with worker_rig(metrics=metrics) as rig:
        rig.index.auto = wants(1, 3)
        running = rig.submit(PROMPT, mode=ResidencyMode.EXACT, max_tokens=40)
        rig.run(running)
        moved = values(metrics, MetricName.HOST_TO_DEVICE, Attr.REASON)
        assert moved["demand"] == running.report.demand_bytes
        assert moved["prefetch"] == running.report.prefetch_bytes


def test_writes_are_pending_until_they_are_records(
    metrics: InMemoryMetricReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    with worker_rig(metrics=metrics) as rig:
        published: list[PublishedRecord] = []
        publish = rig.arena.publish

        def keeping(records: Sequence[PublishedRecord], span: Span) -> Future[list[SlotRef]]:
            published.extend(records)
            return publish(records, span)

        monkeypatch.setattr(rig.arena, "publish", keeping)
        seen = 0
        running = rig.submit(PROMPT, max_tokens=2)

        def saw_writing() -> bool:
            nonlocal seen
            pending = total(metrics, MetricName.PENDING_WRITES)
            assert pending == len(running.sequence.arena.writing)
            seen = max(seen, pending)
            return running.is_over

        rig.run_until(saw_writing)
        rig.run(running)
        assert seen > 0
        assert total(metrics, MetricName.PENDING_WRITES) == 0
        assert total(metrics, MetricName.DEVICE_TO_HOST) == sum(record.payload_bytes for record in published)


def test_a_prefetch_sample_leads_to_the_trace_of_its_request(metrics: InMemoryMetricReader) -> None:
    with worker_rig(metrics=metrics) as rig:
        rig.index.auto = wants(1, 3)
        running = rig.submit(PROMPT, mode=ResidencyMode.LOOKAHEAD, max_tokens=40)
        rig.run(running)
        points = data_points(metrics, MetricName.PREFETCH_LATENCY)
        assert {point.attributes[Attr.PHASE] for point in points} == {
            "predict",
            "queue",
            "load",
            "wait",
            "commit",
            "total",
        }
        trace_id = running.sequence.span.get_span_context().trace_id
        assert [{one.trace_id for one in point.exemplars} for point in points] == [{trace_id}] * 6


def test_gauges_show_blocks_and_sequences_as_they_are(metrics: InMemoryMetricReader) -> None:
    with worker_rig(metrics=metrics, max_running=1, admission_timeout_s=600.0) as rig:
        observe_worker(rig.parts, rig.loop)
        running = [rig.submit(PROMPT[:700], max_tokens=4, name=name) for name in ("a", "b")]
        rig.run_until(lambda: len(running[0].tokens) >= 1)
        sequences = values(metrics, MetricName.SEQUENCES, Attr.STATE)
        assert sequences == {"running": 1, "waiting": 1}
        held = {
            point.attributes[Attr.POOL]: point.value
            for point in data_points(metrics, MetricName.BLOCKS)
            if point.attributes[Attr.STATE] == "held"
        }
        assert held["rows"] == running[0].sequence.resident.num_resident == rig.parts.blocks.rows.num_held
        assert held["slots"] == 1
        rig.run(*running)
        after = data_points(metrics, MetricName.BLOCKS)
        assert sum(point.value for point in after if point.attributes[Attr.STATE] == "held") == 0
