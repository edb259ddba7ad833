"""The processes of one case: cold pool, index and worker as they are served, without gateway and Redis."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from forepage.coldpool.client import ColdPoolClient
from forepage.rpc.edge import is_serving
from forepage.settings import ModelSettings
from forepage.telemetry import open_telemetry
from forepage.worker.assembly import ModelFolder
from loadtest.throughput.case import Case
from loadtest.throughput.history import prompt_of, write_history
from loadtest.throughput.progress import say
from loadtest.throughput.trace import Trace

START_S = 500.0
STOP_S = 60.0
POLL_S = 0.1
SPARE_SLOTS = 64
NO_RESUME_TOKENS = 1 << 24
"""Resume records of the answers are not what is measured: none is taken."""
LOG_TAIL = 2000

Counters = Mapping[tuple[str, str], float]
"""A worker's metrics: (name, the values of its labels, of a bucket its upper bound) -> value."""


class StartError(Exception):
    """A process of the system under test did not start, or ended."""


@dataclass(frozen=True)
class System:
    """Where the worker answers."""

    worker_address: str
    metrics_port: int
    index_pid: int
    prompt: list[int]

    @contextmanager
    def index_stopped(self) -> Iterator[None]:
        """Nothing is predicted meanwhile: the sets stay as they are."""
        os.kill(self.index_pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.index_pid, signal.SIGCONT)

    def counters(self) -> Counters:
        """The worker's metrics now."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as reply:
            text = reply.read().decode()
        found: dict[tuple[str, str], float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = {k: v for k, v in sample.labels.items() if k == "le" or k.startswith("forepage_")}
                key = (sample.name, ",".join(labels[name] for name in sorted(labels)))
                found[key] = found.get(key, 0.0) + sample.value
        return found


@asynccontextmanager
async def running_system(
    model: ModelSettings,
    folder: ModelFolder,
    case: Case,
    *,
    sequences: int,
    device: str,
    changes: Mapping[str, str] | None = None,
) -> AsyncIterator[System]:
    """Everything up, the history written; `changes` of the processes' settings go over the case's own.

    Raises: StartError with the end of a process's log.
    """
    ports = dict(zip(("coldpool", "index", "worker", "metrics"), _free_ports(4), strict=True))
    address = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    trace = Trace(case.budget_blocks, case.plan.interval_steps, case.plan.overlap)
    commands = {
        "coldpool": ["-m", "forepage", "coldpool"],
        "index": ["-m", "loadtest.throughput.index", json.dumps(asdict(trace))],
        "worker": ["-m", "forepage", "worker"],
    }
    environ = _environ(model, case, sequences=sequences, device=device, address=address, ports=ports)
    environ |= changes or {}
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        started: dict[str, subprocess.Popen[bytes]] = {}
        stack.callback(_stop, started)
        telemetry = open_telemetry("loadtest", instance_id="throughput")
        stack.callback(telemetry.close)
        for name, command in commands.items():
            started[name] = _start(command, environ, logs / name)
            if name == "coldpool":
                await _ready(name, started, address, logs)
                say("cold pool ready")
        client = ColdPoolClient(
            address["coldpool"],
            holder_id="history",
            slot_bytes=case.geometry.slot_bytes,
            model_fingerprint=folder.fingerprint,
            telemetry=telemetry,
        )
        try:
            await client.attach()
            prompt = prompt_of(case.prompt_tokens)
            await write_history(client, case.geometry, folder.fingerprint, prompt)
            say("history of", case.prompt_tokens, "tokens written")
            for name in ("index", "worker"):
                await _ready(name, started, address, logs)
                say(name, "ready")
            yield System(address["worker"], ports["metrics"], started["index"].pid, prompt)
        finally:
            await client.close()


def arena_slots(case: Case, sequences: int) -> int:
    """Of the history, and of what so many sequences that read it write themselves."""
    geometry = case.geometry
    resume_parts = -(-geometry.resume_bytes // geometry.slot_bytes)
    own = case.total_blocks - case.prompt_blocks + 3 * resume_parts + 2
    return case.total_blocks + resume_parts + sequences * own + SPARE_SLOTS


def _environ(
    model: ModelSettings,
    case: Case,
    *,
    sequences: int,
    device: str,
    address: Mapping[str, str],
    ports: Mapping[str, int],
) -> dict[str, str]:
    geometry, plan = case.geometry, case.plan
    key_share, c128_share = case.shares(sequences)
    slots = arena_slots(case, sequences)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FOREPAGE_", "OTEL_"))}
    return kept | {
        "FOREPAGE_INSTANCE": f"throughput-{os.getpid()}",
        "FOREPAGE_MODEL__PATH": str(model.path),
        "FOREPAGE_MODEL__DEVICE": device,
        "FOREPAGE_COLDPOOL__LISTEN": address["coldpool"],
        "FOREPAGE_COLDPOOL__CAPACITY_BYTES": str(slots * geometry.slot_bytes),
        "FOREPAGE_INDEX__LISTEN": address["index"],
        "FOREPAGE_INDEX__DEVICE": device,
        "FOREPAGE_WORKER__LISTEN": address["worker"],
        "FOREPAGE_WORKER__INDEX_ADDRESS": address["index"],
        "FOREPAGE_WORKER__COLDPOOL_ADDRESS": address["coldpool"],
        "FOREPAGE_WORKER__METRICS_PORT": str(ports["metrics"]),
        "FOREPAGE_WORKER__KV_BYTES": str(plan.kv_bytes),
        "FOREPAGE_WORKER__KEY_SHARE": str(key_share),
        "FOREPAGE_WORKER__C128_SHARE": str(c128_share),
        "FOREPAGE_WORKER__MAX_RUNNING": str(sequences),
        "FOREPAGE_WORKER__RECENT_TOKENS": str(plan.recent_tokens),
        "FOREPAGE_WORKER__LOAD_SLACK_BLOCKS": str(plan.slack_blocks),
        "FOREPAGE_WORKER__INTERVAL_STEPS": str(plan.interval_steps),
        "FOREPAGE_WORKER__MAX_CONTEXT_TOKENS": str(max(512, case.prompt_tokens + plan.answer_tokens)),
        "FOREPAGE_WORKER__WARM_UP_TOKENS": json.dumps([max(512, case.prompt_tokens + plan.answer_tokens)]),
        "FOREPAGE_WORKER__RESUME_EVERY_TOKENS": str(NO_RESUME_TOKENS),
        "FOREPAGE_WORKER__ESCALATION_RESERVE_BYTES": "0",
        "FOREPAGE_WORKER__PROMPT_TOKENS": "0",
    }


async def _ready(
    name: str, started: Mapping[str, subprocess.Popen[bytes]], address: Mapping[str, str], logs: Path
) -> None:
    deadline_s = time.monotonic() + START_S
    while not await is_serving(address[name], None, timeout_s=1.0):
        if started[name].poll() is not None or time.monotonic() > deadline_s:
            raise StartError(f"{name} is not ready: {(logs / name).read_text()[-LOG_TAIL:]}")
        await asyncio.sleep(POLL_S)


def _start(command: list[str], environ: Mapping[str, str], log_path: Path) -> subprocess.Popen[bytes]:
    with log_path.open("wb") as log:
        return subprocess.Popen([sys.executable, *command], env=environ, stdout=log, stderr=log)


def _stop(started: Mapping[str, subprocess.Popen[bytes]]) -> None:
    for process in reversed(list(started.values())):
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
