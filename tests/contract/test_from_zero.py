"""Every series that a role counts is one it began at zero; read from the calls that count."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from forepage.coldpool.counters import ARENA
from forepage.errors import ERROR_BY_CODE
from forepage.from_zero import FROM_ZERO, begin_at_zero
from forepage.kv.guard import GuardAction
from forepage.settings import Tier
from forepage.telemetry import Attr, MetricName, open_telemetry
from forepage.worker.lookahead_state import Outcome
from forepage.worker.stalls import Stall
from rigs.gateways import data_points

SERVICES = Path(__file__).parents[2] / "services" / "forepage"
OF_THE_CLIENT = {"client.py", "attachment.py"}
"""Of the cold pool's folder: they run in a worker."""
LATER = {MetricName.TOKENS}
"""Its label is the model's name, known from the first answer on."""
GPU_ONLY = {"host_sampling", "eager_decode"}
COMPUTED: dict[tuple[str, MetricName], set[str]] = {
    ("worker", MetricName.FALLBACKS): {Outcome.INDEX_DOWN, Outcome.REFUSED} | GPU_ONLY,
    ("worker", MetricName.ESCALATIONS): {
        action.name.lower()
        for action in GuardAction
        if action not in (GuardAction.NONE, GuardAction.STEP_BACK)
    },
    ("worker", MetricName.STALLED): set(Stall),
    ("worker", MetricName.ROOM_MOVES): {"returned", "left"},
    ("gateway", MetricName.REFUSALS): set(ERROR_BY_CODE),
    ("index", MetricName.FALLBACKS): {"plan_not_published", "queue_full", "redis_down", "stopped"},
    ("coldpool", MetricName.DAMAGED): {ARENA, "directory", *Tier},
    ("coldpool", MetricName.FALLBACKS): {f"coldpool_tier_{tier}" for tier in Tier},
    ("coldpool", MetricName.ARENA_SLOTS): {"free", "writing", "leased", "cached"},
}
"""Values that a call does not spell."""


def counting_calls(role: str) -> Iterator[tuple[MetricName, dict[str, str | None]]]:
    """(metric, labels) of the role's calls; a label's value is None where it is computed."""
    for path in sorted(SERVICES.rglob("*.py")):
        folder = path.relative_to(SERVICES).parts[0]
        if role != ("worker" if path.name in OF_THE_CLIENT else folder):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args and is_counting(node.func):
                name = ast.unparse(node.args[0]).removeprefix("MetricName.")
                yield MetricName[name], {key.arg or "**": literal(key.value) for key in node.keywords}


def is_counting(function: ast.expr) -> bool:
    """`telemetry.count`, `count`, `telemetry.move`, of a metric's name."""
    return ast.unparse(function).rpartition("telemetry.")[2] in ("count", "move")


def literal(value: ast.expr) -> str | None:
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def spelt(role: str) -> set[tuple[MetricName, str, str]]:
    """(metric, label, value) of every call; no label: two empty words."""
    found = set()
    for name, labels in counting_calls(role):
        if not labels:
            found.add((name, "", ""))
        for label, value in labels.items():
            values = {value} if value is not None else COMPUTED.get((role, name), {f"computed: {label}"})
            found |= {(name, label, str(one)) for one in values}
    return {one for one in found if one[0] not in LATER}


@pytest.mark.parametrize("role", FROM_ZERO)
def test_what_is_counted_began_at_zero(role: str) -> None:
    began = set()
    for name, series in FROM_ZERO[role].items():
        for labels in series:
            began |= {(name, label, value) for label, value in labels.items()} or {(name, "", "")}
    flat = {(name, value) for name, _, value in spelt(role)}
    graphs = {MetricName.DECODE_GRAPHS, MetricName.DECODE_GRAPH_BYTES}
    assert {one for one in flat if one[0] not in graphs} == {(name, value) for name, _, value in began}
    assert len(began) > 2


@pytest.mark.parametrize("role", FROM_ZERO)
def test_the_zeros_are_there_to_be_collected(role: str) -> None:
    reader = InMemoryMetricReader()
    telemetry = open_telemetry(role, instance_id="test", metric_readers=[reader])
    begin_at_zero(telemetry, role)
    for name, series in FROM_ZERO[role].items():
        wanted = [{Attr[key.upper()].value: value for key, value in labels.items()} for labels in series]
        points = {tuple(point.attributes.items()): point.value for point in data_points(reader, name)}
        assert points == {tuple(labels.items()): 0 for labels in wanted}
    telemetry.close()
