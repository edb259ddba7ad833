"""telemetry.py alone spells the names of spans, attributes and metrics; checked on the syntax tree."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from forepage.telemetry import OBSERVED, SPAN_PARENTS, Attr, MetricName, SpanName, open_telemetry

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("services", "kernels")
    for path in (ROOT / folder).rglob("*.py")
    if path.name != "telemetry.py" and "_pb2" not in path.name
)
NAMESPACES = ("forepage.", "gen_ai.", "http.", "error.")
DECLARED: set[str] = {*SpanName, *MetricName, *Attr}
LOGGER_CALLS = {"get_logger", "getLogger"}
SPAN_CALLS = {"span": "SpanName", "start_span": "SpanName"}
METRIC_CALLS = dict.fromkeys(("count", "move", "record", "observe"), "MetricName")
SDK_CALLS = {"start_as_current_span", "set_attribute", "add_event", "create_counter", "create_histogram"}
OWN_PARAMETERS = {"kind", "parent", "start_ns", "value", "name", "span"}
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def calls(tree: ast.AST) -> Iterator[tuple[str, str, ast.Call]]:
    """(receiver's last name, function name, call)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            match node.func:
                case ast.Attribute(value=ast.Attribute(attr=receiver), attr=name):
                    yield receiver, name, node
                case ast.Attribute(value=ast.Name(id=receiver), attr=name):
                    yield receiver, name, node
                case ast.Attribute(attr=name):
                    yield "", name, node
                case ast.Name(id=name):
                    yield "", name, node


def telemetry_calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """(enum that the first argument must come from, call) of calls on a Telemetry."""
    for receiver, name, call in calls(tree):
        if receiver.strip("_") == "telemetry" and name in SPAN_CALLS | METRIC_CALLS:
            yield (SPAN_CALLS | METRIC_CALLS)[name], call


def literals(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def docstrings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            yield from literals(node) if isinstance(node.value, ast.Constant) else ()


@each_source
def test_no_declared_name_is_spelled_outside_telemetry(path: Path) -> None:
    tree = ast.parse(path.read_text())
    allowed = set(docstrings(tree))
    for _, name, call in calls(tree):
        if name in LOGGER_CALLS:
            allowed.update(literals(call))
    spelled = {text for text in literals(tree) if text in DECLARED or text.startswith("gen_ai.")}
    assert spelled - allowed == set()


@each_source
def test_spans_and_metrics_are_named_by_enum_members(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for enum, call in telemetry_calls(tree):
        assert call.args, f"line {call.lineno}: the name comes first"
        assert not list(literals(call.args[0])), f"line {call.lineno}: {enum} wanted"
    direct = [call.lineno for _, name, call in calls(tree) if name in SDK_CALLS and list(literals(call))]
    assert direct == [], "names come from the enums of telemetry.py"


@each_source
def test_attributes_are_declared(path: Path) -> None:
    tree = ast.parse(path.read_text())
    keywords = [keyword for _, call in telemetry_calls(tree) for keyword in call.keywords]
    for _, name, call in calls(tree):
        keywords += call.keywords if name == "set_attributes" else []
    names = {keyword.arg for keyword in keywords if keyword.arg} - OWN_PARAMETERS
    assert {name for name in names if name.upper() not in Attr.__members__} == set()


def test_every_metric_has_a_unit_and_a_description() -> None:
    reader = InMemoryMetricReader()
    telemetry = open_telemetry("test", instance_id="test", metric_readers=[reader])
    for name in telemetry.counters:
        telemetry.count(name)
    for name in telemetry.updowns:
        telemetry.move(name, 1)
    for name in telemetry.histograms:
        telemetry.record(name, 1)
    for name in OBSERVED:
        telemetry.observe(name, lambda: [(1, {"state": "free"})])
    data = reader.get_metrics_data()
    assert data is not None
    metrics = [m for r in data.resource_metrics for scope in r.scope_metrics for m in scope.metrics]
    telemetry.close()
    assert {metric.name for metric in metrics} == set(MetricName)
    assert [metric.name for metric in metrics if not metric.unit or not metric.description] == []


def test_names_have_a_known_namespace() -> None:
    assert {name for name in DECLARED if not name.startswith(NAMESPACES)} == set()


def test_every_span_has_a_parent_that_leads_to_the_request() -> None:
    assert set(SPAN_PARENTS) == set(SpanName)
    for name in SpanName:
        seen = [name]
        while (parent := SPAN_PARENTS[seen[-1]]) is not None:
            assert parent not in seen
            seen.append(parent)
        assert seen[-1] is SpanName.HTTP_REQUEST
