"""`forepage trace`: the request that was meant, its tree in order, long ones cut in the middle."""

import io
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from forepage import __main__ as cli
from forepage.console.timeline import phase_durations, request_traces, timeline, trace_of
from forepage.console.trace_view import trace_view
from forepage.errors import RequestError
from forepage.span_log import StoredSpan
from forepage.telemetry import SpanName
from rigs.stored_spans import TRACE_ID, request_spans, stored

OTHER_ID = "a" * 32


def write(folder: Path, spans: list[StoredSpan]) -> None:
    (folder / "worker-0.jsonl").write_text("".join(json.dumps(asdict(span)) + "\n" for span in spans))


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["trace", *arguments], catch_exceptions=False)
    return result.exit_code, result.output


@pytest.mark.parametrize("asked", [TRACE_ID, "x-4bf9", "seq-4bf9", "chatcmpl-seq-4bf9", "cmpl-seq-4bf9"])
def test_a_request_is_found_by_every_id_it_has(asked: str) -> None:
    traces = request_traces([*request_spans(1), *request_spans(1, trace_id=OTHER_ID, at_ms=5)])
    assert trace_of(traces, asked).trace_id == TRACE_ID


def test_an_unknown_request_is_refused_with_what_to_do() -> None:
    with pytest.raises(RequestError, match="`forepage trace` without an id lists"):
        trace_of(request_traces(request_spans(1)), "x-none")


def test_requests_are_listed_newest_first_and_probes_are_not() -> None:
    probe = stored(SpanName.HTTP_REQUEST, 1, None, 0, 1, trace_id="c" * 32)
    refused = stored(SpanName.HTTP_REQUEST, 1, None, 3, 4, trace_id="d" * 32, error="no worker")
    newer = request_spans(1, trace_id=OTHER_ID, at_ms=9)
    traces = request_traces([*request_spans(1), probe, refused, *newer])
    assert [trace.trace_id for trace in traces] == [OTHER_ID, "d" * 32, TRACE_ID]
    assert traces[1].error == "no worker"


def test_rows_are_the_tree_in_order() -> None:
    [trace] = request_traces(reversed(request_spans(2)))
    rows = [(row.depth, row.span.name) for row in timeline(trace, max_intervals=10)]
    phases = [(4, name) for name in (SpanName.PREDICT, SpanName.LOAD, SpanName.WAIT, SpanName.COMMIT)]
    assert rows == [
        (0, SpanName.HTTP_REQUEST),
        (1, SpanName.GATEWAY_GENERATE),
        (2, SpanName.WORKER_GENERATE),
        (3, SpanName.WORKER_PREFILL),
        *((3, SpanName.INTERVAL), *phases) * 2,
    ]


def test_many_intervals_are_cut_in_the_middle_and_counted() -> None:
    [trace] = request_traces(request_spans(50))
    rows = [row for row in timeline(trace, max_intervals=5) if row.span.name == SpanName.INTERVAL]
    assert [row.num_hidden for row in rows] == [0, 0, 0, 45, 0, 0]
    assert rows[3].hidden_ms == pytest.approx(450)
    shown = [row.span.attributes["forepage.lookahead.interval"] for row in rows if not row.num_hidden]
    assert shown == [0, 1, 2, 48, 49]


def test_a_span_whose_parent_was_not_kept_is_still_drawn() -> None:
    [trace] = request_traces(span for span in request_spans(1) if span.name != SpanName.WORKER_GENERATE)
    depths = {row.span.name: row.depth for row in timeline(trace, max_intervals=5)}
    assert depths[SpanName.WORKER_PREFILL] == depths[SpanName.INTERVAL] == 0
    assert depths[SpanName.PREDICT] == 1


def test_phases_are_measured_over_all_intervals() -> None:
    [trace] = request_traces(request_spans(50))
    found = phase_durations(trace)
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(found, 50)
    means = [sum(values) / 50 for values in found.values()]
    assert means == pytest.approx([1, 2, 3, 4])


def test_bars_lie_where_the_spans_do() -> None:
    [trace] = request_traces(request_spans(9))  # 200 ms
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(trace_view(trace, max_intervals=9))
    lines = {line.split()[0]: line for line in console.export_text().splitlines() if "━" in line}
    bars = {name: (line.index("━"), line.count("━")) for name, line in lines.items()}
    whole_start, whole_cells = bars["gateway.request"]
    prefill_start, prefill_cells = bars["worker.prefill"]
    assert prefill_start == whole_start
    assert prefill_cells == pytest.approx(whole_cells / 2, abs=1)
    last_start, last_cells = bars["lookahead.interval"]
    assert last_start + last_cells == pytest.approx(whole_start + whole_cells, abs=2)


def test_command_lists_and_draws(tmp_path: Path) -> None:
    write(tmp_path, [*request_spans(3), *request_spans(1, trace_id=OTHER_ID, at_ms=5)])
    code, listed = run("--spans", str(tmp_path))
    assert code == 0
    assert listed.index("x-aaaa") < listed.index("x-4bf9")
    code, drawn = run("x-4bf9", "--spans", str(tmp_path))
    assert code == 0
    assert drawn.count("lookahead.interval") == 3
    assert "12,000 tokens in" in drawn
    assert "committed" in drawn


def test_command_says_what_is_missing_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREPAGE_COLDPOOL__SHM_DIR", str(tmp_path))  # no `forepage up` there
    code, output = run()
    assert code == 1
    assert "FOREPAGE_TELEMETRY__SPAN_DIR" in output
    code, output = run("--spans", str(tmp_path / "none"))
    assert code == 1
    assert "there is no folder" in output
    write(tmp_path, request_spans(1))
    code, output = run("x-none", "--spans", str(tmp_path))
    assert code == 1
    assert output.startswith("forepage trace: no span of request 'x-none'")
