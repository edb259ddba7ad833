"""Dashboards and alerts ask for metrics that exist, and every file that the overlay mounts is there."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from prometheus_client import REGISTRY, generate_latest

from forepage.telemetry import Attr, open_telemetry

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker" / "observability"
NAME = re.compile(r"\b(?:forepage|gen_ai)_\w+")


def expressions() -> Iterator[str]:
    dashboard = json.loads((FOLDER / "grafana" / "dashboards" / "forepage.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
            yield target["legendFormat"]
    for group in yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]:
        for rule in group["rules"]:
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
    lines = generate_latest(REGISTRY).decode().splitlines()
    telemetry.close()
    return {name for line in lines if not line.startswith("#") for name in NAME.findall(line)[:1]}


def test_dashboards_and_alerts_use_declared_names() -> None:
    labels = {name.replace(".", "_") for name in Attr}
    asked = {name for expression in expressions() for name in NAME.findall(expression)}
    assert len(asked) > 10
    assert asked - exposed_names() - labels == set()


def test_dashboard_panels_have_their_own_place() -> None:
    panels = json.loads((FOLDER / "grafana" / "dashboards" / "forepage.json").read_text())["panels"]
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels) == len({panel["id"] for panel in panels})


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
