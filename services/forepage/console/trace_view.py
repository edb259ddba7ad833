"""One request's timeline, and the list of requests, as a terminal shows them."""

from collections.abc import Callable, Sequence
from datetime import datetime
from statistics import fmean

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from forepage.console.timeline import RequestTrace, TimelineRow, phase_durations, timeline
from forepage.span_log import StoredSpan
from forepage.telemetry import Attr, SpanName

BAR_CELLS = 36
_NAMESPACE = "forepage."
_STYLES: dict[str, str] = {
    SpanName.WORKER_PREFILL: "blue",
    SpanName.WORKER_DECODE: "bright_blue",
    SpanName.INTERVAL: "bold",
    SpanName.PREDICT: "cyan",
    SpanName.INDEX_LOOKAHEAD: "cyan",
    SpanName.LOAD: "green",
    SpanName.WAIT: "yellow",
    SpanName.COMMIT: "magenta",
}
_NOTES: tuple[tuple[Attr, str], ...] = (
    (Attr.INTERVAL, "#{}"),
    (Attr.POSITION, "at token {:,}"),
    (Attr.OUTCOME, "{}"),
    (Attr.DESIRED_BLOCKS, "{} wanted"),
    (Attr.LOADED_BLOCKS, "{} loaded"),
    (Attr.DROPPED_BLOCKS, "{} dropped"),
    (Attr.RESIDENT_BLOCKS, "{} resident"),
    (Attr.INPUT_TOKENS, "{:,} tokens in"),
    (Attr.CACHED_TOKENS, "{:,} cached"),
    (Attr.OUTPUT_TOKENS, "{:,} out"),
    (Attr.NUM_BLOCKS, "{} blocks"),
    (Attr.NUM_AUDITS, "{} audits"),
    (Attr.FALLBACK, "fell back: {}"),
    (Attr.HTTP_STATUS, "{}"),
)


def trace_view(trace: RequestTrace, *, max_intervals: int) -> RenderableType:
    """A head, a line a span with a bar over the request's whole time, and what the intervals took."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("span", no_wrap=True)
    table.add_column("start ms", justify="right", no_wrap=True)
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, width=BAR_CELLS)
    table.add_column("")
    for row in timeline(trace, max_intervals=max_intervals):
        _add(table, trace, row)
    return Group(_head(trace), table, _phases(trace))


def list_view(traces: Sequence[RequestTrace]) -> RenderableType:
    """One line a request, the newest first."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for name, justify in (("began", "left"), ("request", "left"), ("ms", "right"), ("in", "right")):
        table.add_column(name, justify="right" if justify == "right" else "left", no_wrap=True)
    for name in ("out", "mode", "end"):
        table.add_column(name, no_wrap=True)
    for trace in traces:
        began = datetime.fromtimestamp(trace.start_ns / 1e9).astimezone()
        table.add_row(
            f"{began:%H:%M:%S}",
            trace.attribute(Attr.REQUEST_ID) or trace.attribute(Attr.SEQUENCE_ID),
            f"{trace.total_ms:,.0f}",
            trace.attribute(Attr.INPUT_TOKENS),
            trace.attribute(Attr.OUTPUT_TOKENS),
            trace.attribute(Attr.MODE),
            Text(trace.error or "ok", style="red" if trace.error else "green"),
        )
    return table


def _head(trace: RequestTrace) -> Text:
    began = datetime.fromtimestamp(trace.start_ns / 1e9).astimezone()
    parts = [
        f"request {trace.attribute(Attr.REQUEST_ID) or trace.attribute(Attr.SEQUENCE_ID)}",
        f"trace {trace.trace_id}",
        trace.attribute(Attr.REQUEST_MODEL),
        trace.attribute(Attr.MODE),
        f"{began:%Y-%m-%d %H:%M:%S}",
        f"{trace.total_ms:,.1f} ms",
    ]
    head = Text(" · ".join(part for part in parts if part), style="bold")
    if trace.error:
        head.append(f"\nfailed: {trace.error}", style="red")
    return head.append("\n")


def _add(table: Table, trace: RequestTrace, row: TimelineRow) -> None:
    span, style = row.span, _STYLES.get(row.span.name, "")
    name = "  " * row.depth + span.name.removeprefix(_NAMESPACE)
    start_ms = (span.start_ns - trace.start_ns) / 1e6
    if row.num_hidden:
        name = "  " * row.depth + f"… {row.num_hidden} more"
        table.add_row(Text(name, style="dim"), f"{start_ms:,.1f}", f"{row.hidden_ms:,.1f}", "", "")
        return
    table.add_row(
        Text(name, style="red" if span.error else style),
        f"{start_ms:,.1f}",
        f"{span.duration_ms:,.1f}",
        Text(_bar(start_ms, span.duration_ms, trace.total_ms), style="red" if span.error else style),
        _note(span),
    )


def _bar(start_ms: float, duration_ms: float, total_ms: float) -> str:
    """Where the span lies in the whole; never shorter than one cell."""
    scale = BAR_CELLS / total_ms if total_ms > 0 else 0.0
    first = min(BAR_CELLS - 1, int(start_ms * scale))
    cells = min(BAR_CELLS - first, max(1, round(duration_ms * scale)))
    return " " * first + "━" * cells


def _note(span: StoredSpan) -> Text:
    said = [form.format(span.attributes[name]) for name, form in _NOTES if name in span.attributes]
    note = Text(", ".join(said), style="dim")
    if span.error:
        note.append(f"{', ' if said else ''}{span.error}", style="red")
    return note


def _phases(trace: RequestTrace) -> RenderableType:
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("\nof each interval", no_wrap=True)
    for name in ("times", "mean ms", "p95 ms", "longest ms"):
        table.add_column("\n" + name, justify="right")
    shown = {phase: found for phase, found in phase_durations(trace).items() if found}
    for phase, found in shown.items():
        figures: tuple[Callable[[list[float]], float], ...] = (fmean, _p95, max)
        table.add_row(
            Text(phase.rpartition(".")[2], style=_STYLES[phase]),
            f"{len(found):,}",
            *(f"{figure(found):,.2f}" for figure in figures),
        )
    if not shown:
        return Text("\nno lookahead interval: nothing of this request was paged", style="dim")
    return table


def _p95(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
