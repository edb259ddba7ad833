"""What the dashboards and the alert rules ask Prometheus, and the series that a query selects."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from forepage.telemetry import Attr

FOLDER = Path(__file__).parents[2] / "docker" / "observability"
RULES = FOLDER / "rules.yaml"
DASHBOARDS = sorted((FOLDER / "grafana" / "dashboards").glob("*.json"))
NAME = re.compile(r"\b(?:forepage|gen_ai)_\w+")
_SELECTOR = re.compile(rf"{NAME.pattern}(?:\{{[^}}]*\}})?")
_LABELS = {name.replace(".", "_") for name in Attr}


def panels() -> Iterator[dict[str, Any]]:
    """Of every dashboard."""
    for path in DASHBOARDS:
        yield from json.loads(path.read_text())["panels"]


def alert_rules() -> list[dict[str, Any]]:
    """Of every group."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def panel_queries(rate_interval: str) -> dict[str, str]:
    """By panel and legend, with Grafana's variable set."""
    asked = ((panel["title"], target) for panel in panels() for target in panel["targets"])
    return {
        f"{title}: {target['legendFormat']}": target["expr"].replace("$__rate_interval", rate_interval)
        for title, target in asked
    }


def selectors(expression: str) -> set[str]:
    """Series that an expression selects: names with their matchers, without what only labels name."""
    bare = re.sub(r"\b(?:by|without|on|ignoring) *\([^)]*\)", "", expression)
    return {found for found in _SELECTOR.findall(bare) if found not in _LABELS}
