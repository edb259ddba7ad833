"""Spans that a process keeps: bounded, whole lines, one owner a file, never in the way of a request."""

import json
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult

from forepage.errors import DependencyError
from forepage.settings import TelemetrySettings
from forepage.settings_environment import SettingsError
from forepage.span_log import SpanLog, StoredSpan, read_spans, span_log_processors
from forepage.telemetry import Attr, SpanName, open_telemetry

LIMIT_BYTES = 1 << 16


def finished(count: int) -> list[ReadableSpan]:
    """Ended spans, numbered by an attribute."""
    tracer = TracerProvider().get_tracer("test")
    spans: list[ReadableSpan] = []
    for number in range(count):
        span = tracer.start_span(SpanName.COMMIT, attributes={Attr.INTERVAL: number})
        span.end()
        assert isinstance(span, ReadableSpan)
        spans.append(span)
    return spans


def test_a_span_is_read_as_it_was(tmp_path: Path) -> None:
    settings = TelemetrySettings(span_dir=tmp_path / "spans")
    telemetry = open_telemetry(
        "worker", instance_id="w", span_processors=span_log_processors("worker", settings)
    )
    outer = telemetry.start_span(SpanName.WORKER_GENERATE, sequence_id="s", num_blocks=7)
    with pytest.raises(DependencyError), telemetry.span(SpanName.WORKER_ADMIT, outer):
        raise DependencyError("the cold pool is down")
    outer.end()
    telemetry.close()
    spans = {span.name: span for span in read_spans(tmp_path / "spans")}
    parent, child = spans[SpanName.WORKER_GENERATE], spans[SpanName.WORKER_ADMIT]
    assert (parent.service, parent.parent_id, parent.error) == ("forepage-worker", None, None)
    assert parent.attributes == {Attr.SEQUENCE_ID: "s", Attr.NUM_BLOCKS: 7}
    assert (child.parent_id, child.trace_id) == (parent.span_id, parent.trace_id)
    assert child.error == "the cold pool is down"
    assert parent.start_ns <= child.start_ns <= child.end_ns <= parent.end_ns
    assert child.duration_ms <= parent.duration_ms


def test_nothing_is_kept_unless_asked_for() -> None:
    assert span_log_processors("worker", TelemetrySettings()) == []


def test_files_stay_below_their_bound_and_keep_the_newest(tmp_path: Path) -> None:
    log = SpanLog(tmp_path, "worker", LIMIT_BYTES)
    spans = finished(600)
    batch_bytes = sum(len(json.dumps(StoredSpan.of(span).attributes)) for span in spans[:20]) + 20 * 400
    for start in range(0, 600, 20):
        assert log.export(spans[start : start + 20]) is SpanExportResult.SUCCESS
        assert sum(path.stat().st_size for path in tmp_path.glob("*.jsonl")) <= LIMIT_BYTES + batch_bytes
    log.shutdown()
    kept = sorted(span.attributes[Attr.INTERVAL] for span in read_spans(tmp_path))
    assert kept == list(range(600 - len(kept), 600))
    assert 100 < len(kept) < 600


def test_two_processes_have_files_of_their_own_and_a_restart_goes_on(tmp_path: Path) -> None:
    first, second = (SpanLog(tmp_path, "gateway", LIMIT_BYTES) for _ in range(2))
    [one, two, three] = finished(3)
    first.export([one])
    second.export([two])
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["gateway-0.jsonl", "gateway-1.jsonl"]
    first.shutdown()
    again = SpanLog(tmp_path, "gateway", LIMIT_BYTES)
    again.export([three])
    again.shutdown()
    second.shutdown()
    numbers = [
        json.loads(line)["attributes"][Attr.INTERVAL]
        for line in (tmp_path / "gateway-0.jsonl").read_text().splitlines()
    ]
    assert numbers == [0, 2]


def test_half_a_line_costs_that_span_alone(tmp_path: Path) -> None:
    log = SpanLog(tmp_path, "index", LIMIT_BYTES)
    log.export(finished(2))
    log.shutdown()
    path = tmp_path / "index-0.jsonl"
    path.write_text(path.read_text()[:-20])
    assert [span.attributes[Attr.INTERVAL] for span in read_spans(tmp_path)] == [0]


def test_a_folder_that_went_away_fails_the_export_without_raising(tmp_path: Path) -> None:
    folder = tmp_path / "spans"
    log = SpanLog(folder, "worker", LIMIT_BYTES)
    (folder / "worker-0.lock").unlink()
    folder.rmdir()
    assert log.export(finished(1)) is SpanExportResult.FAILURE
    log.shutdown()


def test_files_are_their_owners_alone(tmp_path: Path) -> None:
    log = SpanLog(tmp_path / "spans", "worker", LIMIT_BYTES)
    log.export(finished(1))
    log.shutdown()
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "spans").iterdir()}
    assert set(modes.values()) == {0o600}
    assert (tmp_path / "spans").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_made_is_refused_by_the_name_of_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = TelemetrySettings(span_dir=tmp_path / "file")
    with pytest.raises(SettingsError, match="FOREPAGE_TELEMETRY__SPAN_DIR: cannot write"):
        span_log_processors("worker", settings)
