"""A real Prometheus over the processes of a stack: it scrapes, keeps the rules, and answers queries."""

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from rigs.stack import free_port, wait_until

SCRAPE_S = 1
START_S = 30.0
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed (apt install prometheus)"
)


class QueryError(Exception):
    """Prometheus refused a query; the text has its reason."""


@dataclass(frozen=True)
class Prometheus:
    """A running server."""

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Samples now. Raises: QueryError."""
        return self._get("query", query=expression)["result"]  # type: ignore[no-any-return]

    def rules(self) -> list[dict[str, Any]]:
        """Every rule, with its state, health and last error."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def exemplars(self, expression: str) -> list[dict[str, Any]]:
        """Series with their exemplars of the last hour."""
        now_s = float(self._get("query", query="time()")["result"][0])
        return self._get("query_exemplars", query=expression, start=now_s - 3600, end=now_s + 60)  # type: ignore[no-any-return]

    def targets(self) -> dict[str, str]:
        """What is scraped, by job: how the last scrape went ("" is well)."""
        active = self._get("targets")["activeTargets"]
        return {one["labels"]["job"]: one["lastError"] for one in active if one["health"] != "unknown"}

    def _get(self, what: str, **parameters: Any) -> Any:
        reply = httpx.get(f"{self.url}/api/v1/{what}", params=parameters, timeout=30.0).json()
        if reply["status"] != "success":
            raise QueryError(reply["error"])
        return reply["data"]


@contextmanager
def running_prometheus(folder: Path, targets: Mapping[str, str], rules: Path) -> Iterator[Prometheus]:
    """Scrape host:port by name, every second, until the block ends."""
    jobs = [{"job_name": name, "static_configs": [{"targets": [at]}]} for name, at in targets.items()]
    every = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"}
    config = folder / "prometheus.yaml"
    config.write_text(yaml.safe_dump({"global": every, "rule_files": [str(rules)], "scrape_configs": jobs}))
    listen = f"127.0.0.1:{free_port()}"
    options = {
        "config.file": str(config),
        "storage.tsdb.path": str(folder / "data"),
        "web.listen-address": listen,
        "enable-feature": "exemplar-storage",
    }
    command = ["prometheus", *(f"--{name}={value}" for name, value in options.items())]
    with (folder / "prometheus.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    server = Prometheus(f"http://{listen}")
    try:
        wait_until(lambda: _is_ready(server.url), timeout_s=START_S, what="prometheus ready")
        yield server
    finally:
        process.terminate()
        process.wait(30.0)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready", timeout=1.0).status_code == 200
    except httpx.HTTPError:
        return False
