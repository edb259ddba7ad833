"""Managers and holders as real processes, killed and stopped: who keeps which blocks, and what comes back.

Run as a script this file is a holder: it does what lines of JSON on stdin say and answers on stdout.
"""

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from forepage.coldpool.client import ColdPoolClient, PoolStat, PublishedRecord, RecordKind, SlotRef
from forepage.coldpool.records import payload_checksum
from forepage.coldpool.server import read_geometry
from forepage.errors import CapacityError, ForepageError
from forepage.kv.ids import ArenaId
from forepage.logs import open_logs
from forepage.settings import ModelSettings, TelemetrySettings
from forepage.telemetry import open_telemetry

SLOT_BYTES = read_geometry(ModelSettings()).slot_bytes
NUM_SLOTS = 8
PAYLOAD_BYTES = 1000
MANAGER = """
from forepage.coldpool.server import run
from forepage.rpc.edge import run_until_signal
from forepage.settings_environment import load_settings
run_until_signal(lambda stop: run(load_settings(), stop))
"""


def key_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def payload_of(name: str) -> bytes:
    return hashlib.shake_128(name.encode()).digest(PAYLOAD_BYTES)


def new_client(address: str, name: str) -> ColdPoolClient:
    return ColdPoolClient(
        address,
        holder_id=name,
        slot_bytes=SLOT_BYTES,
        model_fingerprint="m",
        telemetry=open_telemetry("test", instance_id=name),
    )


async def store(client: ColdPoolClient, names: Sequence[str]) -> list[SlotRef]:
    refs = await client.reserve(len(names))
    for ref, name in zip(refs, names, strict=True):
        client.view.payload(ref.arena_id)[:PAYLOAD_BYTES] = payload_of(name)
    return await client.publish(
        [
            PublishedRecord(
                ref,
                key_of(name),
                RecordKind.RESUME if name.startswith("r") else RecordKind.BLOCK,
                part=0,
                num_parts=1,
                payload_bytes=PAYLOAD_BYTES,
                checksum=payload_checksum(payload_of(name)),
            )
            for ref, name in zip(refs, names, strict=True)
        ]
    )


def read(client: ColdPoolClient, ref: SlotRef) -> bytes | None:
    """The record's bytes; None where the slot is another one by now."""
    data = bytes(client.view.payload(ref.arena_id)[:PAYLOAD_BYTES])
    return data if client.view.matches(ref) else None


# What the holder process does


async def obey(client: ColdPoolClient, order: dict[str, Any]) -> Any:
    match order["do"]:
        case "store":
            return [(ref.arena_id, ref.generation) for ref in await store(client, order["names"])]
        case "reserve":
            return [(ref.arena_id, ref.generation) for ref in await client.reserve(order["count"])]
        case "attach":
            return await client.attach()
        case "intact":
            refs = [SlotRef(ArenaId(arena_id), generation) for arena_id, generation in order["refs"]]
            return [
                read(client, ref) == payload_of(name) for ref, name in zip(refs, order["names"], strict=True)
            ]
        case "num_leases":
            return client.num_leases


async def be_a_holder(address: str, name: str) -> None:
    open_logs("holder", TelemetrySettings(log_level="error"))  # stderr: stdout is for answers
    client = new_client(address, name)
    await client.attach()
    print(json.dumps("ready"), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        try:
            answer = await obey(client, json.loads(line))
        except ForepageError as error:
            answer = {"error": error.code}
        print(json.dumps(answer), flush=True)
    await client.close()


# What the tests see


@dataclass
class Holder:
    """A holder process and its orders."""

    process: subprocess.Popen[str]

    def start_to_ask(self, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, **order: Any) -> Any:
        self.start_to_ask(**order)
        return self.answer()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        if number is signal.SIGKILL:
            self.process.wait(timeout=10)


@dataclass
class Host:
    """A folder that stands for one machine's shared memory, and the processes on it."""

    folder: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"unix:{self.folder}/s"

    def start_manager(self) -> subprocess.Popen[str]:
        settings = {
            "LISTEN": self.address,
            "SHM_DIR": str(self.folder),
            "CAPACITY_BYTES": str(NUM_SLOTS * SLOT_BYTES),
            "PROBE_INTERVAL_S": "0.02",
        }
        env = {name: value for name, value in os.environ.items() if not name.startswith("FOREPAGE_")}
        env |= {f"FOREPAGE_COLDPOOL__{name}": value for name, value in settings.items()}
        env |= {"FOREPAGE_INSTANCE": "t", "FOREPAGE_TELEMETRY__LOG_LEVEL": "error"}
        process = subprocess.Popen([sys.executable, "-c", MANAGER], env=env, text=True)
        self.processes.append(process)
        return process

    def start_holder(self, name: str) -> Holder:
        process = subprocess.Popen(
            [sys.executable, __file__, self.address, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return Holder(process)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait(timeout=10)
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()


@pytest.fixture
def host() -> Iterator[Host]:
    with tempfile.TemporaryDirectory(prefix="fp-", dir="/dev/shm") as folder:
        its = Host(Path(folder))
        try:
            yield its
        finally:
            its.close()


@pytest.fixture
async def client(host: Host) -> AsyncIterator[ColdPoolClient]:
    its = new_client(host.address, "test")
    yield its
    await its.close()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(timeout=10)


async def until(client: ColdPoolClient, condition: Callable[[PoolStat], bool]) -> PoolStat:
    deadline = time.monotonic() + 20
    while True:
        try:
            stat = await client.stat()
        except ForepageError:
            stat = None
        if stat is not None and condition(stat):
            return stat
        assert time.monotonic() < deadline, stat
        await asyncio.sleep(0.02)


async def test_killed_holder_gives_back_leases_and_half_written_slots(
    host: Host, client: ColdPoolClient
) -> None:
    host.start_manager()
    holder = host.start_holder("victim")
    await client.attach()
    assert holder.answer() == "ready"
    refs = holder.ask(do="store", names=["a", "r"])
    holder.ask(do="reserve", count=3)
    stat = await client.stat()
    assert (stat.leased, stat.writing, stat.holders) == (2, 3, 2)
    holder.send(signal.SIGKILL)
    stat = await until(client, lambda stat: stat.holders == 1)
    assert (stat.leased, stat.writing, stat.cached, stat.free) == (0, 0, 2, NUM_SLOTS - 2)
    assert not list(host.folder.glob("*victim*"))
    lease = await client.lease_prefix([key_of("a")], [key_of("r")])
    assert [(ref.arena_id, ref.generation) for ref in [*lease.blocks, *lease.resume_parts]] == [
        tuple(ref) for ref in refs
    ]
    assert read(client, lease.blocks[0]) == payload_of("a")


async def test_stopped_holder_keeps_its_blocks(host: Host, client: ColdPoolClient) -> None:
    host.start_manager()
    holder = host.start_holder("sleeper")
    await client.attach()
    assert holder.answer() == "ready"
    names = ["a", "b", "r"]
    refs = holder.ask(do="store", names=names)
    holder.ask(do="reserve", count=1)
    holder.send(signal.SIGSTOP)
    # Everything else is used up, again and again.
    for turn in range(20):
        await client.release(await store(client, [f"{turn}-{number}" for number in range(NUM_SLOTS - 4)]))
    # Another holder comes and goes: once it is missed, the sleeper has been looked at too.
    marker = new_client(host.address, "marker")
    await marker.attach()
    await marker.close()
    await until(client, lambda stat: stat.holders == 2)
    with pytest.raises(CapacityError):
        await client.reserve(NUM_SLOTS - 3)
    stat = await client.stat()
    assert (stat.leased, stat.writing, stat.holders) == (3, 1, 2)
    assert stat.evictions > NUM_SLOTS
    holder.send(signal.SIGCONT)
    assert holder.ask(do="intact", refs=refs, names=names) == [True, True, True]
    assert holder.ask(do="num_leases") == 4


async def test_killed_manager_comes_back_with_every_record_and_lease(
    host: Host, client: ColdPoolClient
) -> None:
    manager = host.start_manager()
    holder, dying = host.start_holder("holder"), host.start_holder("dying")
    await client.attach()
    assert (holder.answer(), dying.answer()) == ("ready", "ready")
    names = ["a", "b", "r"]
    refs = holder.ask(do="store", names=names)
    await client.release(await store(client, ["cached"]))
    dying.ask(do="store", names=["d"])
    dying.ask(do="reserve", count=1)
    uuid = client.view.uuid
    kill(manager)
    dying.send(signal.SIGKILL)
    assert holder.ask(do="intact", refs=refs, names=names) == [True, True, True], "while it is down"
    assert holder.ask(do="reserve", count=1) == {"error": "dependency_unavailable"}
    host.start_manager()
    await until(client, lambda stat: stat.total == NUM_SLOTS)
    await client.attach()
    assert client.view.uuid == uuid
    with pytest.raises(CapacityError):
        await client.reserve(NUM_SLOTS - 4)  # would evict; the holder has not announced
    holder.ask(do="attach")
    stat = await until(client, lambda stat: stat.writing == 0)
    assert (stat.leased, stat.cached, stat.free) == (3, 2, NUM_SLOTS - 5)
    lease = await client.lease_prefix([key_of("a"), key_of("b")], [b"", key_of("r")])
    assert [read(client, ref) for ref in lease.blocks] == [payload_of("a"), payload_of("b")]
    assert [(ref.arena_id, ref.generation) for ref in lease.blocks] == [tuple(ref) for ref in refs[:2]]
    await client.reserve(NUM_SLOTS - 3)
    assert holder.ask(do="intact", refs=refs, names=names) == [True, True, True]


async def test_holder_stopped_over_a_restart_of_the_manager_keeps_its_blocks(
    host: Host, client: ColdPoolClient
) -> None:
    manager = host.start_manager()
    holder = host.start_holder("sleeper")
    await client.attach()
    assert holder.answer() == "ready"
    refs = holder.ask(do="store", names=["a", "b"])
    holder.send(signal.SIGSTOP)
    kill(manager)
    host.start_manager()
    await until(client, lambda stat: stat.total == NUM_SLOTS)
    await client.attach()
    for turn in range(10):
        await client.release(await store(client, [f"{turn}-{number}" for number in range(NUM_SLOTS - 2)]))
    with pytest.raises(CapacityError):
        await client.reserve(NUM_SLOTS - 1)
    holder.send(signal.SIGCONT)
    holder.ask(do="attach")
    assert holder.ask(do="intact", refs=refs, names=["a", "b"]) == [True, True]
    assert (await client.stat()).leased == 2
    holder.send(signal.SIGKILL)
    await until(client, lambda stat: stat.leased == 0)
    await client.reserve(NUM_SLOTS)


async def test_no_kill_of_the_manager_ever_shows_wrong_bytes_or_leaks(
    host: Host, client: ColdPoolClient
) -> None:
    host.start_manager()
    await client.attach()
    num_reads, num_failures = 0, 0
    for turn in range(90):
        block, resume = f"b{turn % 5}", f"r{turn % 5}"
        if turn in (30, 60):
            kill(host.processes[-1])
            host.start_manager()
        try:
            refs = await store(client, [block, resume])
            lease = await client.lease_prefix([key_of(block)], [key_of(resume)])
            assert [read(client, ref) for ref in lease.blocks] == [payload_of(block)]
            await client.release([*lease.blocks, *lease.resume_parts])
            await client.release(refs)
            num_reads += 1
        except ForepageError:
            num_failures += 1
            await until(client, lambda stat: stat.total == NUM_SLOTS)
            await client.release(list(client._bond.leases.elements()))
    stat = await client.stat()
    assert num_reads + num_failures == 90
    assert 2 <= num_failures < 20
    assert (stat.leased, stat.writing, client.num_leases) == (0, 0, 0)
    assert stat.free + stat.cached == stat.total


if __name__ == "__main__":
    asyncio.run(be_a_holder(*sys.argv[1:]))
