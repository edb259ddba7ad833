"""A running system seen from outside: what its processes hold, by /proc and by their own counts."""

import asyncio
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx

from forepage.rpc import coldpool_pb2, coldpool_pb2_grpc, worker_pb2, worker_pb2_grpc

START_S = 120.0
STOP_S = 60.0
POLL_S = 0.1
ROLES = ("valkey", "coldpool", "index", "worker", "gateway")


@dataclass(frozen=True)
class Holdings:
    """What is held at one moment; bytes and descriptors by process, `leaks` are blocks and slots in use."""

    anonymous_bytes: Mapping[str, int]
    descriptors: Mapping[str, int]
    leaks: Mapping[str, int]

    @property
    def leaked_blocks(self) -> int:
        """Blocks and slots that somebody holds."""
        return sum(self.leaks.values())


@dataclass(frozen=True)
class System:
    """Where to ask, and whom to look at."""

    url: str
    coldpool_address: str
    worker_addresses: Sequence[str]
    process_ids: Mapping[str, int]

    async def holdings(self) -> Holdings:
        """Now. Raises: AioRpcError when a process does not answer."""
        leaks = await self._arena()
        for number, address in enumerate(self.worker_addresses):
            reply = await self.describe(address)
            leaks |= {
                f"worker {number} rows": reply.row_blocks_total - reply.row_blocks_free,
                f"worker {number} keys": reply.key_blocks_total - reply.key_blocks_free,
                f"worker {number} sequences": reply.running + reply.waiting,
                f"worker {number} slots": reply.max_running - reply.slots_free,
                f"worker {number} leases": reply.arena_slots_held,
            }
        return Holdings(
            {name: anonymous_bytes(pid) for name, pid in self.process_ids.items()},
            {name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in self.process_ids.items()},
            leaks,
        )

    async def idle_holdings(self, timeout_s: float = 30.0) -> Holdings:
        """Once nothing is held any more, or what still is at the deadline."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            found = await self.holdings()
            if not found.leaked_blocks or time.monotonic() > deadline_s:
                return found
            await asyncio.sleep(POLL_S)

    async def describe(self, address: str) -> worker_pb2.DescribeReply:
        """A worker's own counts."""
        async with grpc.aio.insecure_channel(address) as channel:
            stub = worker_pb2_grpc.DecodeWorkerStub(channel)
            reply: worker_pb2.DescribeReply = await stub.Describe(worker_pb2.DescribeRequest(), timeout=20.0)
            return reply

    async def _arena(self) -> dict[str, int]:
        async with grpc.aio.insecure_channel(self.coldpool_address) as channel:
            stub = coldpool_pb2_grpc.ColdPoolStub(channel)
            reply: coldpool_pb2.StatReply = await stub.Stat(coldpool_pb2.StatRequest(), timeout=20.0)
        lost = reply.total - reply.free - reply.writing - reply.leased - reply.cached
        return {"arena leased": reply.leased, "arena writing": reply.writing, "arena lost": lost}


def anonymous_bytes(process_id: int) -> int:
    """Memory of its own that is resident: not what it maps of files and of the arena."""
    for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise ProcessLookupError(process_id)


@asynccontextmanager
async def running_system(environ: Mapping[str, str], *, num_errors: int = 25) -> AsyncIterator[System]:
    """`forepage up` of an instance of its own on free ports, ended with the block.

    Raises: RuntimeError with the end of its output when it does not come up.
    """
    ports = {role: _free_port() for role in ("gateway", "coldpool", "index", "worker")}
    addresses = {role: f"127.0.0.1:{port}" for role, port in ports.items()}
    told = dict(environ) | {
        "FOREPAGE_INSTANCE": f"soak-{os.getpid()}",
        "FOREPAGE_GATEWAY__PORT": str(ports["gateway"]),
        **{f"FOREPAGE_{role.upper()}__LISTEN": addresses[role] for role in ("coldpool", "index", "worker")},
    }
    url = f"http://{addresses['gateway']}"
    with tempfile.TemporaryFile("w+") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "forepage", "up", env=told, stdout=output, stderr=output
        )
        try:
            if not await _is_ready(url, process):
                output.seek(0)
                raise RuntimeError("".join(output.readlines()[-num_errors:]))
            yield System(url, addresses["coldpool"], [addresses["worker"]], _children_by_role(process.pid))
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGINT)
            try:
                await asyncio.wait_for(process.wait(), STOP_S)
            except TimeoutError:
                process.kill()
                await process.wait()


async def _is_ready(url: str, process: asyncio.subprocess.Process) -> bool:
    deadline_s = time.monotonic() + START_S
    async with httpx.AsyncClient() as client:
        while process.returncode is None and time.monotonic() < deadline_s:
            with suppress(httpx.HTTPError):
                if (await client.get(f"{url}/health/ready")).status_code == 200:
                    return True
            await asyncio.sleep(POLL_S)
    return False


def _children_by_role(process_id: int) -> dict[str, int]:
    found = {}
    for child in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split():
        command = Path(f"/proc/{child}/cmdline").read_bytes().decode(errors="replace").split("\0")
        role = next((role for role in ROLES if role in command or role in command[0]), None)
        if role is not None:
            found[role] = int(child)
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
