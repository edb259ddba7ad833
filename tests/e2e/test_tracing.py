"""One request, one trace, through every process: received over OTLP, edge by edge."""

import secrets

from forepage.telemetry import SPAN_PARENTS, Attr, SpanName
from rigs.chat import stream_chat
from rigs.otlp import ReceivedSpan
from rigs.stack import wait_until
from rigs.traced import Traced

SERVICE_OF_SPAN = {
    "forepage.gateway.": "forepage-gateway",
    "forepage.worker.": "forepage-worker",
    "forepage.lookahead.": "forepage-worker",
    "forepage.index.": "forepage-index",
    "forepage.coldpool.": "forepage-coldpool",
}


def test_a_request_is_one_trace_through_every_process(traced: Traced, document: str) -> None:
    trace_id = secrets.token_bytes(16)
    traceparent = f"00-{trace_id.hex()}-{secrets.token_hex(8)}-01"
    answer = stream_chat(
        traced.stack.url,
        [{"role": "user", "content": document}],
        mode="lookahead",
        cache_salt=trace_id.hex(),  # nothing cached: the cold pool is asked for everything
        headers={"traceparent": traceparent},
    )
    assert answer.finish_reason == "length"
    wanted = set(SPAN_PARENTS)

    def is_complete() -> bool:
        spans = traced.spans.trace(trace_id)
        return wanted <= {span.name for span in spans} and any(
            span.name == SpanName.COLDPOOL_RELEASE for span in spans
        )

    wait_until(is_complete, timeout_s=15, what="spans of every kind in the trace")
    spans = traced.spans.trace(trace_id)
    by_id = {span.span_id: span for span in spans}
    for span in spans:
        parent = by_id.get(span.parent_id)
        expected = SPAN_PARENTS[SpanName(span.name)]
        assert (parent.name if parent else None) == expected, span
        prefix = next(prefix for prefix in SERVICE_OF_SPAN if span.name.startswith(prefix))
        assert span.service == SERVICE_OF_SPAN[prefix]
    check_intervals(spans, answer.forepage["intervals"])


def check_intervals(spans: list[ReceivedSpan], num_intervals: int) -> None:
    """Each interval has its phases as children, in order, and says its prefetch latency."""
    intervals = [span for span in spans if span.name == SpanName.INTERVAL]
    assert [span.attributes[Attr.INTERVAL] for span in intervals] == sorted(
        span.attributes[Attr.INTERVAL] for span in intervals
    )
    assert len(intervals) == num_intervals
    committed = [span for span in intervals if span.attributes[Attr.OUTCOME] in ("committed", "unchanged")]
    assert committed
    for interval in committed:
        children = [span for span in spans if span.parent_id == interval.span_id]
        names = [span.name for span in sorted(children, key=lambda span: span.start_ns)]
        assert names[0] == SpanName.PREDICT
        assert names[1:4] == [SpanName.LOAD, SpanName.WAIT, SpanName.COMMIT]
        span_ms = (interval.end_ns - interval.start_ns) / 1e6
        assert 0 < interval.attributes[Attr.LATENCY_MS] <= span_ms + 1
