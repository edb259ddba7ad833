"""The pool: what eviction, spilling, loading, damage and cancellation do to slots and leases."""

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from forepage.coldpool.arena import Arena
from forepage.coldpool.counters import ColdPoolCounters
from forepage.coldpool.lease_table import LeaseTable, longest_prefix
from forepage.coldpool.pool import ColdPool, Identity
from forepage.coldpool.prefix_lease import lease_prefix
from forepage.coldpool.records import PublishedRecord, RecordKind, SlotRef, SlotState, payload_checksum
from forepage.coldpool.shm_names import HolderId
from forepage.coldpool.tiers import RecordTiers
from forepage.errors import CapacityError, RequestError
from forepage.settings import Tier, Verify
from forepage.telemetry import open_telemetry

SLOT_BYTES = 4096
ANN, BOB = HolderId("ann"), HolderId("bob")


class MemoryTier:
    """A tier that can be held up, to look at the pool while it waits."""

    name = Tier.DISK

    def __init__(self) -> None:
        self.stored: dict[bytes, bytes] = {}
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.waiting = asyncio.Event()

    async def open(self) -> None:
        return

    async def find(self, keys: Sequence[bytes]) -> set[bytes]:
        return {key for key in keys if key in self.stored}

    async def put(self, key: bytes, record: bytes) -> bool:
        self.waiting.set()
        await self.go_on.wait()
        self.stored[key] = record
        return True

    async def get(self, key: bytes) -> bytes | None:
        self.waiting.set()
        await self.go_on.wait()
        return self.stored.get(key)

    async def drop(self, key: bytes) -> None:
        self.stored.pop(key, None)

    async def close(self) -> None:
        return


def make_pool(
    folder: Path, *, num_slots: int = 4, tier: MemoryTier | None = None, verify: Verify = Verify.SCRUB
) -> ColdPool:
    counters = ColdPoolCounters(open_telemetry("test", instance_id="test"))
    pool = ColdPool(
        Arena.create(folder / "arena", slot_bytes=SLOT_BYTES, num_slots=num_slots),
        LeaseTable(num_slots, first_generation=100),
        tiers=RecordTiers([] if tier is None else [tier], counters),
        directory=None,
        counters=counters,
        identity=Identity("host", "test"),
        verify=verify,
    )
    pool.add_holder(ANN)
    pool.add_holder(BOB)
    return pool


def key_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def payload_of(name: str) -> bytes:
    return name.encode() * 10


def written(pool: ColdPool, ref: SlotRef, name: str) -> PublishedRecord:
    payload = payload_of(name)
    pool.arena.payload(ref.arena_id)[: len(payload)] = payload
    kind = RecordKind.RESUME if name.startswith("r") else RecordKind.BLOCK
    return PublishedRecord(ref, key_of(name), kind, 0, 1, len(payload), payload_checksum(payload))


async def store(pool: ColdPool, names: Sequence[str], holder: HolderId = ANN) -> list[SlotRef]:
    refs = await pool.reserve(holder, len(names))
    return await pool.publish(
        holder, [written(pool, ref, name) for ref, name in zip(refs, names, strict=True)]
    )


def stored_bytes(pool: ColdPool, ref: SlotRef, name: str) -> bytes:
    return bytes(pool.arena.payload(ref.arena_id)[: len(payload_of(name))])


def corrupt(pool: ColdPool, ref: SlotRef) -> None:
    pool.arena.payload(ref.arena_id)[0] ^= 0xFF


@pytest.mark.parametrize(
    ("blocks", "resumes", "there", "expected"),
    [
        ("abc", ["r", "", "s"], "abcrs", 3),
        ("abc", ["r", "", "s"], "abcr", 1),
        ("abc", ["r", "", "s"], "acrs", 1),
        ("abc", ["r", "", "s"], "bcrs", 0),
        ("abc", ["", "", ""], "abc", 0),
        ("abc", ["", "rs", ""], "abcr", 0),
        ("abc", ["", "rs", ""], "abrs", 2),
        ("", [], "", 0),
    ],
)
def test_longest_prefix_ends_at_a_whole_resume_record(
    blocks: str, resumes: list[str], there: str, expected: int
) -> None:
    block_keys = [name.encode() for name in blocks]
    resume_keys = [[part.encode() for part in parts] for parts in resumes]
    assert longest_prefix(block_keys, resume_keys, lambda key: key.decode() in there) == expected


async def test_headers_follow_every_step(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    (ref,) = await pool.reserve(ANN, 1)
    assert pool.arena.holds(ref)
    assert await pool.publish(ANN, [written(pool, ref, "a")]) == [ref]
    assert pool.arena.matches(ref)
    assert pool.release(ANN, [ref]) == 0
    assert pool.arena.matches(ref), "a cached record stays readable"
    await pool.reserve(BOB, 4)
    assert not pool.arena.matches(ref)


async def test_reserve_is_all_or_nothing(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    await pool.reserve(ANN, 3)
    with pytest.raises(CapacityError) as caught:
        await pool.reserve(BOB, 2)
    assert caught.value.retry_after_s
    assert pool.counts().free == 1


async def test_far_end_of_a_prefix_is_evicted_first(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    pool.release(ANN, await store(pool, ["a", "b", "c", "d"]))
    await pool.reserve(BOB, 2)
    assert [pool.table.find(key_of(name)) is not None for name in "abcd"] == [True, True, False, False]
    assert pool.counters.evictions == 2


async def test_dead_holder_leaves_its_prefix_in_the_same_order(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    await store(pool, ["a", "b", "c", "d"])
    pool.drop_holder(ANN)
    await pool.reserve(BOB, 1)
    assert [pool.table.find(key_of(name)) is not None for name in "abcd"] == [True, True, True, False]


async def test_second_writer_of_a_key_gets_the_first_record(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    (first,) = await store(pool, ["a"])
    assert await store(pool, ["a"], BOB) == [first]
    assert (pool.counts().free, pool.counts().leased) == (3, 1)
    pool.drop_holder(ANN)
    assert pool.counts().leased == 1, "bob's lease moved to the record that stayed"


async def test_publishing_again_after_a_lost_reply_is_answered_as_before(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    (kept,) = await store(pool, ["a"], BOB)
    same, new = await pool.reserve(ANN, 2)
    records = [written(pool, same, "a"), written(pool, new, "b")]
    for _ in range(3):
        assert await pool.publish(ANN, records) == [kept, new]
    assert pool.release(ANN, [kept, kept, new]) == 1, "three publications gave one lease"
    with pytest.raises(RequestError):
        await pool.publish(ANN, records)


async def test_a_freed_slot_is_published_again_neither_as_another_key_nor_by_another(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    await store(pool, ["a", "b"], BOB)
    same, other = await pool.reserve(ANN, 2)
    record = written(pool, same, "a")
    kept, also = await pool.publish(ANN, [record, written(pool, other, "b")])
    for holder, published in ((BOB, record), (ANN, written(pool, same, "b"))):
        with pytest.raises(RequestError):
            await pool.publish(holder, [published])
    assert pool.announce(ANN, [kept, also]) == []
    with pytest.raises(RequestError):
        await pool.publish(ANN, [record])


async def test_publish_refuses_everything_if_one_record_is_wrong(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    mine, other = await pool.reserve(ANN, 1), await pool.reserve(BOB, 1)
    good, not_mine = written(pool, mine[0], "a"), written(pool, other[0], "b")
    for records in ([good, not_mine], [good, good]):
        with pytest.raises(RequestError):
            await pool.publish(ANN, records)
    assert pool.table.find(key_of("a")) is None
    assert pool.arena.holds(mine[0])


async def test_unknown_holder_gets_nothing_and_costs_nothing(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    pool.release(ANN, await store(pool, ["a", "b", "c", "d"]))
    nobody = HolderId("nobody")
    with pytest.raises(RequestError):
        await pool.reserve(nobody, 2)
    with pytest.raises(RequestError):
        await lease_prefix(pool, nobody, [key_of("a")], [[key_of("b")]])
    assert pool.counts().cached == 4


async def test_evicted_record_comes_back_from_its_tier(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, tier=MemoryTier())
    pool.release(ANN, await store(pool, ["a", "b", "r"]))
    pool.release(BOB, await pool.reserve(BOB, 4))
    assert pool.counts().free == 4
    lease = await lease_prefix(pool, ANN, [key_of("a"), key_of("b")], [[], [key_of("r")]])
    names = ["a", "b", "r"]
    refs = [*lease.blocks, *lease.resume_parts]
    assert [stored_bytes(pool, ref, name) for ref, name in zip(refs, names, strict=True)] == [
        payload_of(name) for name in names
    ]
    assert all(pool.arena.matches(ref) for ref in refs)
    assert pool.counts().leased == 3
    assert pool.release(ANN, refs) == 0
    pool.table.check_integrity()


async def test_damaged_record_in_a_tier_is_missing(tmp_path: Path) -> None:
    tier = MemoryTier()
    pool = make_pool(tmp_path, tier=tier)
    pool.release(ANN, await store(pool, ["a", "b", "r", "s"]))
    pool.release(BOB, await pool.reserve(BOB, 4))
    stored = bytearray(tier.stored[key_of("b")])
    stored[-1] ^= 1
    tier.stored[key_of("b")] = bytes(stored)
    lease = await lease_prefix(pool, ANN, [key_of("a"), key_of("b")], [[key_of("s")], [key_of("r")]])
    assert lease.num_blocks == 1
    assert pool.counters.damaged == 1
    assert key_of("b") not in tier.stored
    assert pool.counts().leased == 2


async def test_prefix_shrinks_to_what_the_arena_has_room_for(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, tier=MemoryTier())
    pool.release(ANN, await store(pool, ["b", "r"]))
    pool.release(BOB, await pool.reserve(BOB, 4))
    await store(pool, ["a", "s"], BOB)
    await pool.reserve(BOB, 1)
    lease = await lease_prefix(pool, ANN, [key_of("a"), key_of("b")], [[key_of("s")], [key_of("r")]])
    assert lease.num_blocks == 1
    assert pool.counts().free == 1, "what could not be used is not left leased"


async def test_victim_leased_while_it_is_spilled_is_not_evicted(tmp_path: Path) -> None:
    tier = MemoryTier()
    pool = make_pool(tmp_path, num_slots=3, tier=tier)
    pool.release(ANN, await store(pool, ["a", "r", "x"]))
    tier.go_on.clear()
    reserving = asyncio.create_task(pool.reserve(BOB, 1))
    await tier.waiting.wait()
    # x is the victim; somebody leases it in the middle.
    ref = pool.table.lease(ANN, key_of("x"))
    assert ref is not None
    tier.go_on.set()
    (given,) = await reserving
    assert given.arena_id != ref.arena_id
    assert pool.arena.matches(ref)


async def test_cancelled_lease_leaves_nothing_leased(tmp_path: Path) -> None:
    tier = MemoryTier()
    pool = make_pool(tmp_path, tier=tier)
    pool.release(ANN, await store(pool, ["a", "r"]))
    pool.release(BOB, await pool.reserve(BOB, 4))
    await store(pool, ["a"])
    tier.go_on.clear()
    tier.waiting.clear()
    leasing = asyncio.create_task(lease_prefix(pool, BOB, [key_of("a")], [[key_of("r")]]))
    await tier.waiting.wait()
    assert pool.counts().writing == 1
    leasing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leasing
    counts = pool.counts()
    assert (counts.free, counts.writing, counts.leased) == (3, 0, 1)
    pool.table.check_integrity()


async def test_announcement_during_a_lease_does_not_cost_a_lease(tmp_path: Path) -> None:
    tier = MemoryTier()
    pool = make_pool(tmp_path, tier=tier)
    pool.release(ANN, await store(pool, ["r"]))
    pool.release(BOB, await pool.reserve(BOB, 4))
    (block,) = await store(pool, ["a"])
    tier.go_on.clear()
    tier.waiting.clear()
    leasing = asyncio.create_task(lease_prefix(pool, ANN, [key_of("a")], [[key_of("r")]]))
    await tier.waiting.wait()
    assert pool.announce(ANN, [block]) == []
    leasing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leasing
    assert pool.table.is_leased_by(ANN, block), "the roll-back took a lease that was announced"


async def test_damaged_cached_record_is_dropped(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    refs = await store(pool, ["a", "b"])
    pool.release(ANN, refs)
    corrupt(pool, refs[0])
    assert await pool.check_payloads(refs) == [False, True]
    assert pool.table.find(key_of("a")) is None
    assert (pool.counts().free, pool.counts().cached, pool.counters.damaged) == (3, 1, 1)


async def test_damaged_leased_record_is_no_more_found_and_freed_with_its_lease(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    (ref,) = await store(pool, ["a"])
    corrupt(pool, ref)
    assert not await pool.check_payload(ref)
    assert not await pool.check_payload(ref)
    assert pool.counters.damaged == 1
    assert pool.table.find(key_of("a")) is None
    assert not pool.arena.matches(ref), "its holder sees that it may not be used"
    assert pool.arena.header(ref.arena_id).state is SlotState.DAMAGED
    assert pool.counts().leased == 1
    (again,) = await store(pool, ["a"], BOB)
    assert again.arena_id != ref.arena_id
    pool.release(ANN, [ref])
    assert pool.counts().free == 3


async def test_reused_slot_is_not_taken_for_a_damaged_one(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, num_slots=1)
    (ref,) = await store(pool, ["a"])
    pool.release(ANN, [ref])
    checking = asyncio.create_task(pool.check_payload(ref))
    await asyncio.sleep(0)  # the check has read the record's description
    corrupt(pool, ref)
    await pool.reserve(BOB, 1)
    await checking
    assert pool.counters.damaged == 0
    assert pool.counts().writing == 1


async def test_verify_always_refuses_a_damaged_record_before_leasing_it(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, verify=Verify.ALWAYS)
    refs = await store(pool, ["a", "b", "r", "s"])
    corrupt(pool, refs[1])
    lease = await lease_prefix(pool, BOB, [key_of("a"), key_of("b")], [[key_of("r")], [key_of("s")]])
    assert lease.num_blocks == 1
    assert pool.counters.damaged == 1


async def test_verify_always_takes_the_whole_copy_of_a_tier(tmp_path: Path) -> None:
    tier = MemoryTier()
    pool = make_pool(tmp_path, tier=tier, verify=Verify.ALWAYS)
    pool.release(ANN, await store(pool, ["a", "r"]))
    pool.release(BOB, await pool.reserve(BOB, 4))
    (block,) = (await lease_prefix(pool, ANN, [key_of("a")], [[key_of("r")]])).blocks
    corrupt(pool, block)
    (again,) = (await lease_prefix(pool, BOB, [key_of("a")], [[key_of("r")]])).blocks
    assert again != block
    assert stored_bytes(pool, again, "a") == payload_of("a")


async def test_verify_always_keeps_the_new_record_if_the_old_one_is_damaged(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, verify=Verify.ALWAYS)
    (old,) = await store(pool, ["a"])
    corrupt(pool, old)
    (new,) = await store(pool, ["a"], BOB)
    assert new != old
    assert stored_bytes(pool, new, "a") == payload_of("a")


async def test_damaged_record_is_not_spilled(tmp_path: Path) -> None:
    tier = MemoryTier()
    pool = make_pool(tmp_path, num_slots=1, tier=tier)
    (ref,) = await store(pool, ["a"])
    pool.release(ANN, [ref])
    corrupt(pool, ref)
    await pool.reserve(BOB, 1)
    assert tier.stored == {}
    assert pool.counters.damaged == 1
