"""A real Prometheus over a small stack at work: it can answer what dashboards and alerts ask."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import httpx
import pytest

from rigs.chat import Answer, stream_chat
from rigs.prometheus import Prometheus, needs_prometheus, running_prometheus
from rigs.promql import RULES, alert_rules, panel_queries, selectors
from rigs.stack import Stack, free_port, running_stack, wait_until

pytestmark = needs_prometheus
METERED = ("coldpool", "index", "worker")
SCRAPES_S = 20.0
DOCUMENT_TOKENS = 8_192
CROWDED = {
    "FOREPAGE_WORKER__FULL_SHARE": "1.0",
    "FOREPAGE_WORKER__BUDGET_BLOCKS": "4",
    "FOREPAGE_WORKER__KV_BYTES": str(4_200_000),
    "FOREPAGE_WORKER__KEY_SHARE": "0.4",
    "FOREPAGE_WORKER__C128_SHARE": "0.05",
    "FOREPAGE_WORKER__ESCALATION_RESERVE_BYTES": "0",
    "FOREPAGE_WORKER__LOAD_SLACK_BLOCKS": "4",
    "FOREPAGE_WORKER__INTERVAL_STEPS": "16",
    "FOREPAGE_COLDPOOL__CAPACITY_BYTES": str(8 << 20),
}
"""59 row blocks on the device, 128 slots in the arena; a document has 33: two fit once one is paged."""
GPU_ONLY = "decode graphs are CUDA's"
ABSENT = {"forepage_decode_graphs": GPU_ONLY}
"""Series that no CPU stack has, with the reason."""


@dataclass(frozen=True)
class Watched:
    """A stack, and the Prometheus that scrapes it."""

    stack: Stack
    prometheus: Prometheus


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, document: str) -> Iterator[Watched]:
    """Asked in every way that the panels tell apart, while it is scraped."""
    logs: Path = tmp_path_factory.mktemp("watched")
    ports = {role: free_port() for role in METERED}
    settings = {f"FOREPAGE_{role.upper()}__METRICS_PORT": str(port) for role, port in ports.items()}
    targets = {role: f"127.0.0.1:{port}" for role, port in ports.items()}
    with running_stack(logs, settings=settings | CROWDED) as stack:
        targets["gateway"] = f"127.0.0.1:{stack.ports['gateway']}"
        with running_prometheus(logs, targets, RULES) as prometheus:
            work(stack, document[:DOCUMENT_TOKENS])
            yield Watched(stack, prometheus)


def work(stack: Stack, document: str) -> None:
    """One leaves `full` for another, records are used again and evicted, a request fails.

    Nothing is demanded of recall: the untrained index would move all of them to `exact`.
    """

    def ask(mode: str, max_tokens: int, salt: str, on_chunk: Callable[[Answer], None] | None = None) -> None:
        messages = [{"role": "user", "content": document}]
        ours = {"mode": mode, "min_recall": 0.0}  # one that names a budget is never kept full
        fields = {"max_tokens": max_tokens, "cache_salt": salt, "on_chunk": on_chunk, "forepage": ours}
        stream_chat(stack.url, messages, mode=mode, **fields)  # type: ignore[arg-type]

    decodes = Event()

    def on_chunk(answer: Answer) -> None:
        if answer.text:
            decodes.set()

    with ThreadPoolExecutor(1) as pool:
        kept = pool.submit(ask, "guarded", 300, "first", on_chunk)
        assert decodes.wait(120.0)
        ask("guarded", 40, "second")
        kept.result()
    ask("exact", 40, "second")
    for salt in ("third", "fourth"):
        ask("lookahead", 4, salt)
    too_long = {"model": "forepage-seeded", "prompt": "a", "max_tokens": 10_000_000}
    assert httpx.post(f"{stack.url}/v1/completions", json=too_long).status_code == 400


def test_every_process_is_scraped(watched: Watched) -> None:
    wanted = dict.fromkeys((*METERED, "gateway"), "")
    wait_until(lambda: watched.prometheus.targets() == wanted, timeout_s=SCRAPES_S, what="all scraped")
    named = watched.prometheus.query("count by (job, service_name) ({service_name!=''})")
    assert {one["metric"]["job"]: one["metric"].get("service_name") for one in named} == {
        role: f"forepage-{role}" for role in wanted
    }


def test_every_series_that_is_asked_for_is_there(watched: Watched) -> None:
    asked = {found for query in panel_queries("1m").values() for found in selectors(query)}
    asked |= {found for rule in alert_rules() for found in selectors(rule["expr"])}
    assert len(asked) > 40

    def missing() -> set[str]:
        return {one for one in asked if not watched.prometheus.query(f"count(last_over_time({one}[10m]))")}

    wait_until(lambda: missing() == set(ABSENT), timeout_s=SCRAPES_S, what=f"series; missing: {missing()}")


def test_every_panel_has_something_to_show(watched: Watched) -> None:
    queries = panel_queries("5m")
    empty = {name for name, query in queries.items() if not watched.prometheus.query(query)}
    assert empty == {"Decode graphs: graphs"}, GPU_ONLY


def test_every_alert_is_evaluated(watched: Watched) -> None:
    rules = watched.prometheus.rules()
    assert {rule["name"] for rule in rules} == {rule["alert"] for rule in alert_rules()}
    assert {rule["name"]: rule.get("lastError") for rule in rules if rule["health"] != "ok"} == {}
    assert {rule["name"]: rule["state"] for rule in rules}["NoWorkerReports"] == "inactive"


def test_an_alert_fires_on_the_first_event(watched: Watched) -> None:
    def firing() -> set[str]:
        return {rule["name"] for rule in watched.prometheus.rules() if rule["state"] != "inactive"}

    wait_until(lambda: "RequestsRefused" in firing(), timeout_s=SCRAPES_S, what="an alert of the refusal")


def test_a_dot_leads_to_the_trace_of_a_request(watched: Watched) -> None:
    found = watched.prometheus.exemplars("forepage_prefetch_latency_milliseconds_bucket")
    ids = {exemplar["labels"]["trace_id"] for series in found for exemplar in series["exemplars"]}
    assert ids
