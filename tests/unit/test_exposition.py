"""What a process shows Prometheus: who it is on every series, and exemplars where a span was at hand."""

from collections.abc import Iterator

import pytest
from opentelemetry.trace import Span
from prometheus_client import REGISTRY, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from forepage.from_zero import begin_at_zero
from forepage.telemetry import OBSERVED, MetricName, SpanName, Telemetry, open_telemetry

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
"""What Prometheus accepts."""


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    opened = open_telemetry("worker", instance_id="worker-7", prometheus=True)
    yield opened
    opened.close()


def scrape() -> dict[str, Metric]:
    """Every family, read as Prometheus does."""
    encode, media_type = choose_encoder(OPENMETRICS)
    assert media_type.startswith("application/openmetrics-text")
    return {family.name: family for family in text_string_to_metric_families(encode(REGISTRY).decode())}


def buckets(family: Metric) -> dict[tuple[str, str], Sample]:
    """By phase and upper bound."""
    found = (sample for sample in family.samples if sample.name.endswith("_bucket"))
    return {(one.labels.get("forepage_prefetch_phase", ""), one.labels["le"]): one for one in found}


def ids(span: Span) -> dict[str, str]:
    context = span.get_span_context()
    return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}


def test_all_instruments_together_are_openmetrics(telemetry: Telemetry) -> None:
    begin_at_zero(telemetry, "worker")
    for counter in telemetry.counters:
        telemetry.count(counter)
    for updown in telemetry.updowns:
        telemetry.move(updown, 1)
    with telemetry.span(SpanName.COMMIT) as span:
        for histogram in telemetry.histograms:
            telemetry.record(histogram, 0.5, span=span)
    for observed in OBSERVED:
        telemetry.observe(observed, lambda: [(1, {"state": "free"})])
    families = scrape()
    ours = [family for name, family in families.items() if name.startswith(("forepage_", "gen_ai_"))]
    assert len(ours) == len(MetricName)
    assert [family.name for family in ours if family.type == "unknown" or not family.documentation] == []
    for family in ours:
        of_process = {(s.labels["service_name"], s.labels["service_instance_id"]) for s in family.samples}
        assert of_process == {("forepage-worker", "worker-7")}, family.name
    with_exemplar = {family.name for family in ours if any(s.exemplar for s in family.samples)}
    assert len(with_exemplar) == len(telemetry.histograms)


def test_an_exemplar_is_on_the_bucket_and_the_series_of_its_sample(telemetry: Telemetry) -> None:
    with telemetry.span(SpanName.LOAD) as load, telemetry.span(SpanName.WAIT) as wait:
        telemetry.record(MetricName.PREFETCH_LATENCY, 3.0, span=load, phase="load")
        telemetry.record(MetricName.PREFETCH_LATENCY, 1e6, span=wait, phase="wait")
        telemetry.record(MetricName.PREFETCH_LATENCY, 7.0, phase="wait")
    found = buckets(scrape()["forepage_prefetch_latency_milliseconds"])
    led = {key: one.exemplar for key, one in found.items() if one.exemplar is not None}
    assert {key: (one.labels, one.value) for key, one in led.items()} == {
        ("load", "5"): (ids(load), 3.0),
        ("wait", "+Inf"): (ids(wait), 1e6),
    }, "and none on the sample that no span was at"


def test_a_value_on_a_bound_is_below_it(telemetry: Telemetry) -> None:
    with telemetry.span(SpanName.LOAD) as span:
        telemetry.record(MetricName.PREFETCH_LATENCY, 5.0, span=span, phase="load")
    found = buckets(scrape()["forepage_prefetch_latency_milliseconds"])
    assert [bound for (_, bound), one in found.items() if one.exemplar is not None] == ["5"]


def test_an_exemplar_is_shown_once(telemetry: Telemetry) -> None:
    with telemetry.span(SpanName.LOAD) as span:
        telemetry.record(MetricName.PREFETCH_LATENCY, 5.0, span=span, phase="load")
    scrape()
    again = buckets(scrape()["forepage_prefetch_latency_milliseconds"])
    assert [one for one in again.values() if one.exemplar is not None] == []
    assert again["load", "5"].value == 1


def test_a_closed_process_shows_nothing(telemetry: Telemetry) -> None:
    telemetry.count(MetricName.PREDICTIONS)
    assert "forepage_index_predictions" in scrape()
    other = open_telemetry("index", instance_id="other", prometheus=True)
    other.close()
    assert "forepage_index_predictions" in scrape()
    assert all("other" not in sample.labels.values() for f in scrape().values() for sample in f.samples)
