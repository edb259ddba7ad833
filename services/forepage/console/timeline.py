"""Finished spans as requests: which there were, the tree of one, what its intervals took. Draws nothing."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from forepage.errors import RequestError
from forepage.span_log import StoredSpan
from forepage.telemetry import Attr, SpanName

ID_PREFIXES = ("chatcmpl-", "cmpl-")
"""What an answer's `id` has before our request id."""
PHASES = (SpanName.PREDICT, SpanName.LOAD, SpanName.WAIT, SpanName.COMMIT)
GENERATES = frozenset({SpanName.GATEWAY_GENERATE, SpanName.WORKER_GENERATE})
KEPT_SIBLINGS = 4
"""Of more spans of one name under one parent, other than intervals, only so many are lines of their own."""


@dataclass(frozen=True)
class RequestTrace:
    """One trace: `spans` by start, at least one. Times are relative to `start_ns`, the first start."""

    trace_id: str
    spans: tuple[StoredSpan, ...]

    @property
    def start_ns(self) -> int:
        """When the first span began."""
        return self.spans[0].start_ns

    @property
    def total_ms(self) -> float:
        """To the last span's end."""
        return (max(span.end_ns for span in self.spans) - self.start_ns) / 1e6

    @property
    def error(self) -> str | None:
        """Why it failed, by the outermost span that did."""
        return next((span.error for span in self.spans if span.error is not None), None)

    def attribute(self, name: Attr) -> str:
        """The first value that a span has; empty if none has it."""
        found = (span.attributes[name] for span in self.spans if name in span.attributes)
        return str(next(found, ""))

    def ids(self) -> set[str]:
        """What somebody may ask for it by: trace id, `x-request-id`, and the worker's id of each choice."""
        wanted = (Attr.REQUEST_ID, Attr.SEQUENCE_ID)
        return {self.trace_id} | {
            str(span.attributes[name]) for span in self.spans for name in wanted if name in span.attributes
        }


@dataclass(frozen=True)
class TimelineRow:
    """One line: a span and its depth, or (`num_hidden`) spans that are only counted."""

    depth: int
    span: StoredSpan
    num_hidden: int = 0
    hidden_ms: float = 0.0


def request_traces(spans: Iterable[StoredSpan]) -> list[RequestTrace]:
    """Every generation and every refusal, the newest first; other calls that went well are left out."""
    by_trace: dict[str, list[StoredSpan]] = defaultdict(list)
    for span in spans:
        by_trace[span.trace_id].append(span)
    traces = [
        RequestTrace(trace_id, tuple(sorted(found, key=lambda span: (span.start_ns, -span.end_ns))))
        for trace_id, found in by_trace.items()
    ]
    asked = [trace for trace in traces if trace.error or any(span.name in GENERATES for span in trace.spans)]
    return sorted(asked, key=lambda trace: trace.start_ns, reverse=True)


def trace_of(traces: Sequence[RequestTrace], request_id: str) -> RequestTrace:
    """The newest trace of that id, as an answer, a header, a log line or a trace names it.

    Raises: RequestError when there is none.
    """
    plain = request_id
    for prefix in ID_PREFIXES:
        plain = plain.removeprefix(prefix)
    for trace in traces:
        if {request_id, plain} & trace.ids():
            return trace
    raise RequestError(
        f"no span of request {request_id!r} is kept: it may be too old (FOREPAGE_TELEMETRY__SPAN_BYTES), "
        "still running, or of another instance; `forepage trace` without an id lists those that are",
        "request_id",
    )


def timeline(trace: RequestTrace, *, max_intervals: int) -> Iterator[TimelineRow]:
    """The tree from the top, children by start; of many alike the first and the last, the others counted."""
    ids = {span.span_id for span in trace.spans}
    children: dict[str | None, list[StoredSpan]] = defaultdict(list)
    for span in trace.spans:
        children[span.parent_id if span.parent_id in ids else None].append(span)
    yield from _rows(None, 0, children, max_intervals)


def phase_durations(trace: RequestTrace) -> dict[SpanName, list[float]]:
    """Milliseconds of every predict, load, wait and commit."""
    found: dict[SpanName, list[float]] = {phase: [] for phase in PHASES}
    for span in trace.spans:
        if span.name in found:
            found[SpanName(span.name)].append(span.duration_ms)
    return found


def _rows(
    parent_id: str | None, depth: int, children: dict[str | None, list[StoredSpan]], max_intervals: int
) -> Iterator[TimelineRow]:
    by_name: dict[str, list[StoredSpan]] = defaultdict(list)
    for span in children[parent_id]:
        by_name[span.name].append(span)
    hidden: dict[str, TimelineRow] = {}
    shown: set[str] = set()
    for name, alike in by_name.items():
        limit = max_intervals if name == SpanName.INTERVAL else KEPT_SIBLINGS
        if len(alike) <= limit:
            shown |= {span.span_id for span in alike}
            continue
        first, last = limit - limit // 2, limit // 2
        left_out = alike[first : len(alike) - last]
        shown |= {span.span_id for span in alike if span not in left_out}
        total_ms = sum(span.duration_ms for span in left_out)
        hidden[left_out[0].span_id] = TimelineRow(depth, left_out[0], len(left_out), total_ms)
    for span in children[parent_id]:
        if span.span_id in shown:
            yield TimelineRow(depth, span)
            yield from _rows(span.span_id, depth + 1, children, max_intervals)
        elif span.span_id in hidden:
            yield hidden[span.span_id]
