"""Finished spans as a process would have kept them, for what reads them."""

from forepage.span_log import StoredSpan
from forepage.telemetry import Attr, SpanName

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
MS = 1_000_000
BEGAN_NS = 1_700_000_000_000 * MS


def stored(
    name: str,
    span_id: int,
    parent_id: int | None,
    start_ms: float,
    end_ms: float,
    *,
    trace_id: str = TRACE_ID,
    error: str | None = None,
    attributes: dict[Attr, object] | None = None,
) -> StoredSpan:
    """A span; times count from BEGAN_NS."""
    return StoredSpan(
        name=name,
        service="forepage-test",
        trace_id=trace_id,
        span_id=f"{span_id:016x}",
        parent_id=None if parent_id is None else f"{parent_id:016x}",
        start_ns=BEGAN_NS + int(start_ms * MS),
        end_ns=BEGAN_NS + int(end_ms * MS),
        error=error,
        attributes={str(name): value for name, value in (attributes or {}).items()},
    )


def request_spans(num_intervals: int, *, trace_id: str = TRACE_ID, at_ms: float = 0.0) -> list[StoredSpan]:
    """One paged request: 100 ms of prefill, then an interval every 10 ms, each 1, 2, 3 and 4 ms a phase."""
    ids = {Attr.REQUEST_ID: f"x-{trace_id[:4]}", Attr.SEQUENCE_ID: f"seq-{trace_id[:4]}"}
    end = at_ms + 110 + 10 * num_intervals

    def span(
        name: str, number: int, parent: int | None, start: float, stop: float, **more: object
    ) -> StoredSpan:
        attributes = {Attr[key.upper()]: value for key, value in more.items()}
        return stored(name, number, parent, start, stop, trace_id=trace_id, attributes=attributes)

    spans = [
        span(SpanName.HTTP_REQUEST, 1, None, at_ms, end, request_id=ids[Attr.REQUEST_ID]),
        span(SpanName.GATEWAY_GENERATE, 2, 1, at_ms + 1, end, output_tokens=7),
        span(SpanName.WORKER_GENERATE, 3, 2, at_ms + 2, end, sequence_id=ids[Attr.SEQUENCE_ID]),
        span(SpanName.WORKER_PREFILL, 4, 3, at_ms + 5, at_ms + 105, input_tokens=12_000),
    ]
    for interval in range(num_intervals):
        start, number = at_ms + 106 + 10 * interval, 100 + 10 * interval
        spans.append(
            span(SpanName.INTERVAL, number, 3, start, start + 10, interval=interval, outcome="committed")
        )
        begin = start
        for offset, name in enumerate(
            (SpanName.PREDICT, SpanName.LOAD, SpanName.WAIT, SpanName.COMMIT), start=1
        ):
            spans.append(span(name, number + offset, number, begin, begin + offset))
            begin += offset
    return spans
