"""How long records live, lie idle and wait for their next use, on a clock that the test moves."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from forepage.coldpool.arena import Arena
from forepage.coldpool.counters import ColdPoolCounters
from forepage.coldpool.lease_table import LeaseTable
from forepage.coldpool.pool import ColdPool, Identity
from forepage.coldpool.prefix_lease import lease_prefix
from forepage.coldpool.records import PublishedRecord, RecordKind, SlotRef, payload_checksum
from forepage.coldpool.shm_names import HolderId
from forepage.coldpool.tiers import RecordTiers
from forepage.settings import Tier, Verify
from forepage.telemetry import MetricName, open_telemetry
from rigs.gateways import data_points

ANN, BOB = HolderId("ann"), HolderId("bob")
PAYLOAD = b"payload"
SUM = payload_checksum(memoryview(PAYLOAD))


class KeptTier:
    """A tier in memory: evicting spills to it, under a pin of the manager's own."""

    @property
    def name(self) -> Tier:
        return Tier.DISK

    def __init__(self) -> None:
        self._stored: dict[bytes, bytes] = {}

    async def open(self) -> None:
        return

    async def find(self, keys: Sequence[bytes]) -> set[bytes]:
        return {key for key in keys if key in self._stored}

    async def put(self, key: bytes, record: bytes) -> bool:
        self._stored[key] = record
        return True

    async def get(self, key: bytes) -> bytes | None:
        return self._stored.get(key)

    async def drop(self, key: bytes) -> None:
        self._stored.pop(key, None)

    async def close(self) -> None:
        return


@dataclass
class Host:
    """A pool of two slots and its clock."""

    folder: Path
    with_tier: bool
    now_s: float = 1000.0
    metrics: InMemoryMetricReader = field(default_factory=InMemoryMetricReader)

    def __post_init__(self) -> None:
        telemetry = open_telemetry("test", instance_id="test", metric_readers=[self.metrics])
        counters = ColdPoolCounters(telemetry, clock=lambda: self.now_s)
        self.pool = ColdPool(
            Arena.create(self.folder / "arena", slot_bytes=4096, num_slots=2),
            LeaseTable(2, first_generation=1),
            tiers=RecordTiers([KeptTier()] if self.with_tier else [], counters),
            directory=None,
            counters=counters,
            identity=Identity("host", "test"),
            verify=Verify.SCRUB,
        )
        for holder in (ANN, BOB):
            self.pool.add_holder(holder)

    async def store(self, name: str) -> SlotRef:
        [ref] = await self.pool.reserve(ANN, 1)
        self.pool.arena.payload(ref.arena_id)[: len(PAYLOAD)] = PAYLOAD
        record = PublishedRecord(ref, key_of(name), RecordKind.BLOCK, 0, 1, len(PAYLOAD), SUM)
        [stored] = await self.pool.publish(ANN, [record])
        return stored

    def ages(self, name: MetricName) -> list[float]:
        """Sum of each recorded series, and how many."""
        return [value for point in data_points(self.metrics, name) for value in (point.count, point.sum)]


def key_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


@pytest.fixture(params=[False, True], ids=["no tier", "a tier"])
def host(tmp_path: Path, request: pytest.FixtureRequest) -> Host:
    return Host(tmp_path, with_tier=request.param)


async def test_an_evicted_record_tells_its_life_and_how_long_nobody_wanted_it(host: Host) -> None:
    ref = await host.store("a")
    host.now_s += 10
    host.pool.release(ANN, [ref])
    host.now_s += 30
    await host.pool.reserve(BOB, 2)  # there is no room but its slot
    assert host.ages(MetricName.RECORD_LIFETIME) == [1, 40]
    assert host.ages(MetricName.RECORD_IDLE) == [1, 30]
    assert host.ages(MetricName.RECORD_REUSE_GAP) == []


async def test_a_use_ends_the_idle_time(host: Host) -> None:
    block, resume = await host.store("a"), await host.store("r")
    host.pool.release(ANN, [block, resume])
    host.now_s += 7
    lease = await lease_prefix(host.pool, BOB, [key_of("a")], [[key_of("r")]])
    assert lease.num_blocks == 1
    assert host.ages(MetricName.RECORD_REUSE_GAP) == [2, 14]
    host.pool.release(BOB, [block, resume])
    host.now_s += 3
    await host.pool.reserve(ANN, 2)
    assert host.ages(MetricName.RECORD_IDLE) == [2, 6]
    assert host.ages(MetricName.RECORD_LIFETIME) == [2, 20]


async def test_the_same_record_written_again_is_a_use(host: Host) -> None:
    ref = await host.store("a")
    host.pool.release(ANN, [ref])
    host.now_s += 5
    assert await host.store("a") == ref
    assert host.ages(MetricName.RECORD_REUSE_GAP) == [1, 5]


async def test_a_pin_of_the_managers_own_is_no_use(host: Host) -> None:
    ref = await host.store("a")
    host.pool.release(ANN, [ref])
    host.now_s += 5
    with host.pool.stage() as stage:
        host.pool.table.lease(stage, key_of("a"))
        await host.pool.reserve(BOB, 1)  # a verb that looks at the table meanwhile
        host.now_s += 5
    host.now_s += 5
    await host.pool.reserve(BOB, 1)
    assert host.ages(MetricName.RECORD_IDLE) == [1, 15]
    assert host.ages(MetricName.RECORD_REUSE_GAP) == []


async def test_a_slot_given_back_unwritten_has_no_age(host: Host) -> None:
    host.pool.release(ANN, await host.pool.reserve(ANN, 2))
    assert host.ages(MetricName.RECORD_LIFETIME) == []
