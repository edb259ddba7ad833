"""Dashboards and alerts ask for metrics that exist, and every file that the overlay mounts is there."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from prometheus_client import REGISTRY, generate_latest

from forepage.telemetry import OBSERVED, Attr, MetricName, open_telemetry
from rigs.promql import DASHBOARDS, FOLDER, NAME, alert_rules, panels

ROOT = Path(__file__).parents[2]
PROVISIONED = FOLDER / "grafana" / "provisioning" / "datasources" / "datasources.yaml"
DATASOURCES = {found["uid"]: found for found in yaml.safe_load(PROVISIONED.read_text())["datasources"]}
GRID_COLUMNS = 24
NOT_ON_A_DASHBOARD = {
    MetricName.PREFETCH_BYTES,  # part of HOST_TO_DEVICE, as is
    MetricName.DEMAND_BYTES,
    MetricName.DIRECTORY_DROPPED,  # never, or an alert
    MetricName.DECODE_GRAPH_BYTES,
}


def expressions() -> Iterator[str]:
    for panel in panels():
        for target in panel["targets"]:
            yield target["expr"]
            yield target["legendFormat"]
    for rule in alert_rules():
        yield rule["expr"]
        yield rule["annotations"]["summary"]


def exposed_names() -> set[str]:
    """Names of all our series as Prometheus sees them."""
    reader = PrometheusMetricReader()
    telemetry = open_telemetry("test", instance_id="test", metric_readers=[reader])
    for counter in telemetry.counters:
        telemetry.count(counter)
    for updown in telemetry.updowns:
        telemetry.move(updown, 1)
    for histogram in telemetry.histograms:
        telemetry.record(histogram, 1)
    for observed in OBSERVED:
        telemetry.observe(observed, lambda: [(1, {"state": "free"})])
    lines = generate_latest(REGISTRY).decode().splitlines()
    telemetry.close()
    return {name for line in lines if not line.startswith("#") for name in NAME.findall(line)[:1]}


def test_dashboards_and_alerts_use_declared_names() -> None:
    labels = {name.replace(".", "_") for name in Attr}
    asked = {name for expression in expressions() for name in NAME.findall(expression)}
    assert len(asked) > 10
    assert asked - exposed_names() - labels == set()


def test_every_metric_of_ours_is_on_a_dashboard() -> None:
    asked = " ".join(target["expr"] for panel in panels() for target in panel["targets"])
    shown = {name for name in MetricName if re.search(rf"\b{name.replace('.', '_')}(_|\b)", asked)}
    assert set(MetricName) - shown == NOT_ON_A_DASHBOARD


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboard_is_one_that_grafana_takes(path: Path) -> None:
    dashboard = json.loads(path.read_text())
    assert dashboard["uid"] == f"forepage-{path.stem}"
    own = dashboard["panels"]
    assert len({panel["id"] for panel in own}) == len(own)
    cells: set[tuple[int, int]] = set()
    for panel in own:
        assert panel["datasource"]["uid"] in DATASOURCES
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= GRID_COLUMNS
        covered = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & covered, panel["title"]
        cells |= covered


def test_a_dot_in_a_panel_leads_to_its_trace() -> None:
    shown = [panel["title"] for panel in panels() if any(t.get("exemplar") for t in panel["targets"])]
    assert "Boundary to commit" in shown
    collector = yaml.safe_load((FOLDER / "collector.yaml").read_text())
    assert collector["exporters"]["prometheus"]["enable_open_metrics"] is True
    overlay = yaml.safe_load((ROOT / "docker" / "compose.observability.yaml").read_text())
    assert "--enable-feature=exemplar-storage" in overlay["services"]["prometheus"]["command"]
    [leads_to] = DATASOURCES["prometheus"]["jsonData"]["exemplarTraceIdDestinations"]
    assert leads_to == {"name": "trace_id", "datasourceUid": "jaeger"}
    assert DATASOURCES["jaeger"]["type"] == "jaeger"


def test_every_alert_says_what_is_wrong_and_the_documentation_what_to_do() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    names = [rule["alert"] for rule in alert_rules()]
    assert len(set(names)) == len(names)
    assert [name for name in names if f"| `{name}` |" not in text] == []
    assert {rule["labels"]["severity"] for rule in alert_rules()} == {"warning", "critical"}


def test_every_alert_is_tried_firing_and_quiet() -> None:
    tried = yaml.safe_load((FOLDER / "rules.test.yaml").read_text())["tests"]
    cases = [case for test in tried for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in alert_rules()}
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == names
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == names


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (apt install prometheus)"
)
@pytest.mark.parametrize("command", [("check", "rules", "rules.yaml"), ("test", "rules", "rules.test.yaml")])
def test_promtool_accepts_the_rules(command: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *command], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_mounted_files_exist() -> None:
    overlay = yaml.safe_load((ROOT / "docker" / "compose.observability.yaml").read_text())
    volumes = [volume for service in overlay["services"].values() for volume in service.get("volumes", [])]
    mounted = [volume.split(":")[0] for volume in volumes if volume.startswith("./")]
    assert len(mounted) == 5
    assert [path for path in mounted if not (ROOT / path).exists()] == []


def test_collector_sends_spans_and_metrics_where_they_are_looked_for() -> None:
    collector = yaml.safe_load((FOLDER / "collector.yaml").read_text())
    pipelines = collector["service"]["pipelines"]
    assert pipelines["traces"]["exporters"] == ["otlp/jaeger"]
    port = collector["exporters"][pipelines["metrics"]["exporters"][0]]["endpoint"].rpartition(":")[2]
    [job] = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"otel-collector:{port}"]}]
