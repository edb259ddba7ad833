"""What is taken for another record than it is: refused by its name, or never found; a table for each carrier.

Damage by chance is elsewhere (property/test_coldpool_codec): here every sum is right and one thing is wrong,
the version, the generation, the model, the tenant, the kind, the part. What tokens come of it when the record
was in a tier: test_tier_damage. The other frames in Redis: contract/test_frames_golden.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from forepage.coldpool.arena import Arena, ArenaShape, ArenaView
from forepage.coldpool.counters import ColdPoolCounters
from forepage.coldpool.disk_tier import DiskTier
from forepage.coldpool.lease_table import LeaseTable
from forepage.coldpool.pool import ColdPool, Identity
from forepage.coldpool.prefix_lease import lease_prefix
from forepage.coldpool.records import (
    HEADER_BYTES,
    PublishedRecord,
    RecordInfo,
    RecordKind,
    SlotRef,
    SlotState,
    decode_header,
    decode_record,
    encode_header_fields,
    encode_record,
    pack_tag,
    payload_checksum,
)
from forepage.coldpool.shm_names import HolderId
from forepage.coldpool.slot_table import SlotCounts
from forepage.coldpool.tiers import RecordTiers
from forepage.errors import IntegrityError, RequestError
from forepage.kv.geometry import KeyFormat, KvFormat
from forepage.kv.ids import ArenaId
from forepage.kv.prefix_hash import PrefixHasher, resume_key, salted_key
from forepage.model import fingerprint as fingerprint_module
from forepage.model.fingerprint import model_fingerprint
from forepage.settings import Verify, WeightDtype
from forepage.telemetry import open_telemetry

TOKENS = (3, 1, 4, 1)
PAYLOAD, OTHER_PAYLOAD = b"rows of ours" * 9, b"rows of them" * 9
GENERATION = 77
NEXT_VERSION = struct.pack("<I", 2)


def key_of(fingerprint: str = "model", salt: str = "", tokens: tuple[int, ...] = TOKENS) -> bytes:
    return PrefixHasher(fingerprint, len(tokens), salt).block_keys(tokens)[0]


def record_of(key: bytes, kind: RecordKind, part: int = 0, num_parts: int = 1) -> RecordInfo:
    return RecordInfo(key, kind, part, num_parts, len(PAYLOAD), payload_checksum(PAYLOAD))


BLOCK = record_of(key_of(), RecordKind.BLOCK)
RESUME = record_of(resume_key(key_of(), 1), RecordKind.RESUME, 1, 3)


def changed(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def stored(record: RecordInfo, at: int = 0, new: bytes = b"", payload: bytes = PAYLOAD) -> bytes:
    """A record in a tier as somebody may have written it: with these bytes, and the sum they ask for."""
    data = changed(encode_record(record, PAYLOAD), at, new)
    return data[:72] + payload_checksum(data[:72]).to_bytes(8, "little") + payload


def header(record: RecordInfo, at: int = 0, new: bytes = b"", tag_generation: int = GENERATION) -> bytes:
    """A slot header in the arena, likewise."""
    tag = pack_tag(SlotState.COMPLETE, tag_generation).to_bytes(8, "little")
    data = changed(tag + encode_header_fields(record, GENERATION), at, new)
    header_sum = payload_checksum(GENERATION.to_bytes(8, "little") + data[8:72])
    return (data[:72] + header_sum.to_bytes(8, "little")).ljust(HEADER_BYTES, b"\0")


def superblock(at: int = 0, new: bytes = b"") -> bytes:
    """An arena's first page, likewise."""
    whole = ArenaShape(8_192, 4, "12345678-1234-5678-1234-567812345678").encode()
    body = changed(whole[:-8], at, new)
    return body + payload_checksum(body).to_bytes(8, "little")


def of_others(record: RecordInfo, key: bytes) -> bytes:
    """A whole record of theirs, under the name of `record`."""
    checksum = payload_checksum(OTHER_PAYLOAD)
    return encode_record(replace(record, key=key, checksum=checksum), OTHER_PAYLOAD)


@dataclass(frozen=True)
class Wrong:
    """Bytes, who reads them as what, and what the refusal says."""

    id: str
    data: bytes
    read: Callable[[bytes], object]
    says: str


def wrong_in_tiers(what: str, record: RecordInfo) -> list[Wrong]:
    """Of one record in Redis or on a disk."""

    def read(data: bytes) -> object:
        return decode_record(data, key=record.key)

    another = "another record than its name says"
    theirs = {
        "another model's": key_of("other model"),
        "another tenant's": key_of(salt="tenant"),
        "another text's": key_of(tokens=(3, 1, 4, 2)),
        "one sequence's own": salted_key(key_of(), "r/1"),
        "another part's": resume_key(key_of(), 0),
        "another point's": resume_key(key_of(tokens=TOKENS * 2), 1),
    }
    return [
        Wrong(f"{what}: of another layout", stored(record, 8, NEXT_VERSION), read, "layout version 2, this"),
        Wrong(f"{what}: of a kind unknown", stored(record, 12, b"\3"), read, "kind 3"),
        Wrong(f"{what}: with flags unknown", stored(record, 13, b"\2"), read, "flags 2"),
        Wrong(f"{what}: a part too many", stored(record, 16, b"\3"), read, "part 3"),
        Wrong(f"{what}: longer than it says", stored(record, payload=PAYLOAD + b"x"), read, "described are"),
        Wrong(f"{what}: another's payload", stored(record, payload=OTHER_PAYLOAD), read, "its checksum"),
        Wrong(f"{what}: a slot's header", header(record) + PAYLOAD, read, "not a record of ours"),
        *(Wrong(f"{what}: {who}", of_others(record, key), read, another) for who, key in theirs.items()),
    ]


def wrong_in_headers(what: str, record: RecordInfo) -> list[Wrong]:
    """Of one record's header in the arena."""
    another = header(record, tag_generation=GENERATION + 1)
    return [
        Wrong(
            f"{what} header: of another layout", header(record, 8, NEXT_VERSION), decode_header, "version 2"
        ),
        Wrong(f"{what} header: of a kind unknown", header(record, 12, b"\3"), decode_header, "kind 3"),
        Wrong(f"{what} header: a part too many", header(record, 16, b"\3"), decode_header, "part 3"),
        Wrong(f"{what} header: of another generation", another, decode_header, "does not match its fields"),
        Wrong(f"{what} header: a stored record", stored(record), decode_header, "bytes, wanted 128"),
    ]


ARENAS = [
    Wrong("arena: of another layout", superblock(8, NEXT_VERSION), ArenaShape.decode, "layout version 2"),
    Wrong("arena: of other headers", superblock(12, struct.pack("<I", 64)), ArenaShape.decode, "layout"),
    Wrong("arena: with its payloads elsewhere", superblock(32, b"\1"), ArenaShape.decode, "layout"),
    Wrong("arena: a stored record", stored(BLOCK), ArenaShape.decode, "no superblock"),
]
WRONG = [
    *wrong_in_tiers("block", BLOCK),
    *wrong_in_tiers("resume part", RESUME),
    *wrong_in_headers("block", BLOCK),
    *wrong_in_headers("resume part", RESUME),
    *ARENAS,
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.id)
def test_bytes_of_another_record_are_refused_by_name(wrong: Wrong) -> None:
    with pytest.raises(IntegrityError, match=wrong.says):
        wrong.read(wrong.data)


@pytest.mark.parametrize("record", [BLOCK, RESUME], ids=["block", "resume part"])
def test_the_same_bytes_with_nothing_wrong_are_taken(record: RecordInfo) -> None:
    """Else the table above would be of noise."""
    found, payload = decode_record(stored(record), key=record.key)
    assert (found, bytes(payload)) == (record, PAYLOAD)
    assert decode_header(header(record)).record == record
    assert ArenaShape.decode(superblock()).slot_bytes == 8_192


ANN, BOB = HolderId("ann"), HolderId("bob")
NUM_SLOTS = 3


class Leased:
    """A pool in which Ann leases a record, and the slot of one that she gave back is Bob's by now."""

    def __init__(self, folder: Path, num_slots: int = NUM_SLOTS) -> None:
        counters = ColdPoolCounters(open_telemetry("test", instance_id="test"))
        self.tier = DiskTier(folder / "tier", max_bytes=1 << 20, counters=counters)
        self.pool = ColdPool(
            Arena.create(folder / "arena", slot_bytes=4_096, num_slots=num_slots),
            LeaseTable(num_slots, first_generation=GENERATION),
            tiers=RecordTiers([self.tier], counters),
            directory=None,
            counters=counters,
            identity=Identity("host", "test"),
            verify=Verify.ALWAYS,
        )
        for holder in (ANN, BOB):
            self.pool.add_holder(holder)

    async def start(self) -> None:
        await self.pool.tiers.open()
        gone = replace(BLOCK, key=key_of(tokens=(9, 9, 9, 9)))
        self.mine, self.given = await self.store(ANN, BLOCK, gone)
        self.pool.release(ANN, [self.given])
        refs = {ref.arena_id: ref for ref in await self.pool.reserve(BOB, NUM_SLOTS - 1)}
        self.bobs = refs.pop(self.given.arena_id)
        (self.free,) = refs.values()
        self.pool.release(BOB, [self.free])

    async def store(self, holder: HolderId, *records: RecordInfo) -> list[SlotRef]:
        refs = await self.pool.reserve(holder, len(records))
        for ref, record in zip(refs, records, strict=True):
            self.pool.arena.payload(ref.arena_id)[: record.payload_bytes] = PAYLOAD
        written = [publication(ref, record) for ref, record in zip(refs, records, strict=True)]
        return await self.pool.publish(holder, written)


def publication(ref: SlotRef, record: RecordInfo) -> PublishedRecord:
    checksum, salted = record.checksum, record.salted
    size, parts = record.payload_bytes, record.num_parts
    return PublishedRecord(ref, record.key, record.kind, record.part, parts, size, checksum, salted)


@pytest.fixture
async def leased(tmp_path: Path) -> Leased:
    made = Leased(tmp_path)
    await made.start()
    return made


WRONG_REFS: dict[str, Callable[[Leased], SlotRef]] = {
    "of a slot given away": lambda it: it.given,
    "of a generation to come": lambda it: SlotRef(it.mine.arena_id, it.mine.generation + 9),
    "of a generation before": lambda it: SlotRef(it.mine.arena_id, it.mine.generation - 1),
    "of a generation that wraps": lambda it: SlotRef(it.mine.arena_id, it.mine.generation + (1 << 62)),
    "of a free slot": lambda it: it.free,
    "of no slot": lambda it: SlotRef(ArenaId(NUM_SLOTS), it.mine.generation),
    "of another holder": lambda it: it.bobs,
}
each_wrong_ref = pytest.mark.parametrize("ref_of", WRONG_REFS.values(), ids=WRONG_REFS)


def check_nothing_changed(it: Leased, before: SlotCounts) -> None:
    it.pool.table.check_integrity()
    assert it.pool.counts() == before
    assert it.pool.table.is_leased_by(ANN, it.mine)
    assert it.pool.table.is_leased_by(BOB, it.bobs)
    assert it.pool.arena.matches(it.mine)
    assert it.pool.arena.holds(it.bobs)


@each_wrong_ref
async def test_a_wrong_lease_publishes_nothing(leased: Leased, ref_of: Callable[[Leased], SlotRef]) -> None:
    ref, before = ref_of(leased), leased.pool.counts()
    with pytest.raises(RequestError, match=f"slot {ref.arena_id} is not held by 'ann' at that generation"):
        await leased.pool.publish(ANN, [publication(ref, RESUME)])
    assert leased.pool.table.find(RESUME.key) is None
    check_nothing_changed(leased, before)


@each_wrong_ref
def test_a_wrong_lease_gives_nothing_back(leased: Leased, ref_of: Callable[[Leased], SlotRef]) -> None:
    before = leased.pool.counts()
    assert leased.pool.release(ANN, [ref_of(leased)]) == 1, "counted as stale"
    assert leased.pool.counters.stale_refs == 1
    check_nothing_changed(leased, before)


@each_wrong_ref
def test_a_wrong_lease_is_void_when_it_is_announced(
    leased: Leased, ref_of: Callable[[Leased], SlotRef]
) -> None:
    wrong, before = ref_of(leased), leased.pool.counts()
    assert leased.pool.announce(ANN, [leased.mine, wrong]) == [wrong]
    check_nothing_changed(leased, before)


@each_wrong_ref
def test_a_wrong_lease_is_never_read_as_rows(leased: Leased, ref_of: Callable[[Leased], SlotRef]) -> None:
    view = ArenaView.open(leased.pool.arena.path, writable=False)
    assert not view.matches(ref_of(leased))
    assert view.matches(leased.mine)


async def test_a_wrong_slot_among_right_ones_publishes_none(leased: Leased) -> None:
    (empty,) = await leased.pool.reserve(ANN, 1)
    with pytest.raises(RequestError, match="not held"):
        await leased.pool.publish(ANN, [publication(empty, RESUME), publication(leased.given, RESUME)])
    assert leased.pool.table.find(RESUME.key) is None
    assert leased.pool.arena.holds(empty)


BLOCKS = (TOKENS, TOKENS[::-1])
"""Two blocks of text, and a resume record of three parts behind the second."""


@dataclass(frozen=True)
class Asker:
    """Who asks for a prefix, and what of it differs from what was written."""

    fingerprint: str = "model"
    salt: str = ""
    text: tuple[tuple[int, ...], ...] = BLOCKS
    parts: tuple[int, ...] = (0, 1, 2)

    @property
    def block_keys(self) -> list[bytes]:
        return PrefixHasher(self.fingerprint, len(TOKENS), self.salt).block_keys(sum(self.text, ()))

    @property
    def resume_keys(self) -> list[list[bytes]]:
        return [[], [resume_key(self.block_keys[1], part) for part in self.parts]]


WRITER = Asker()
ASKERS = {
    "another model": Asker(fingerprint="other model"),
    "another tenant": Asker(salt="tenant"),
    "a tenant named like the model": Asker(fingerprint="", salt="model"),
    "another first token": Asker(text=((0, *TOKENS[1:]), BLOCKS[1])),
    "another last token": Asker(text=(BLOCKS[0], (*BLOCKS[1][:-1], 0))),
    "the blocks in another order": Asker(text=BLOCKS[::-1]),
    "the last block without the first": Asker(text=(BLOCKS[1], BLOCKS[1])),
    "a resume record of more parts": Asker(parts=(0, 1, 2, 3)),
}


async def write_prefix(it: Leased, *, salted_by: str = "") -> None:
    """Blocks and resume record of WRITER, of nobody any more, in the arena and (evicted) in the tier."""
    keys = [salted_key(key, salted_by) if salted_by else key for key in WRITER.block_keys]
    blocks = [replace(BLOCK, key=key) for key in keys]
    parts = [replace(RESUME, key=key, part=part) for part, key in enumerate(WRITER.resume_keys[1])]
    it.pool.release(ANN, await it.store(ANN, *blocks, *parts))


@pytest.fixture
async def written(tmp_path: Path) -> Leased:
    made = Leased(tmp_path, num_slots=5)
    await made.pool.tiers.open()
    return made


async def found_by(it: Leased, asker: Asker) -> list[int]:
    """Blocks found while the records are in the arena, and when only the tier has them."""
    found = []
    for _ in range(2):
        lease = await lease_prefix(it.pool, ANN, asker.block_keys, asker.resume_keys)
        found.append(lease.num_blocks)
        it.pool.release(ANN, [*lease.blocks, *lease.resume_parts])
        it.pool.release(BOB, await it.pool.reserve(BOB, it.pool.counts().total))
    return found


@pytest.mark.parametrize("asker", ASKERS.values(), ids=ASKERS)
async def test_a_prefix_of_another_key_is_never_found(written: Leased, asker: Asker) -> None:
    await write_prefix(written)
    assert await found_by(written, asker) == [0, 0]
    assert (await found_by(written, WRITER))[0] == 2, "it was there, for whoever wrote it"
    assert written.pool.counters.damaged == 0


async def test_what_one_sequence_decoded_under_paging_is_found_by_no_other(written: Leased) -> None:
    await write_prefix(written, salted_by="r/1")
    assert await found_by(written, WRITER) == [0, 0]


@pytest.mark.parametrize("part", range(3))
async def test_a_resume_record_that_lacks_a_part_is_none(written: Leased, part: int) -> None:
    await write_prefix(written)
    assert await found_by(written, WRITER) == [2, 2]
    await written.tier.drop(WRITER.resume_keys[1][part])
    assert await found_by(written, WRITER) == [0, 0]


async def test_another_models_folder_or_format_is_another_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a worker puts into its keys differs by all that its records depend on."""
    for name, config in (("ours", "{}"), ("theirs", '{"a": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    ours = tmp_path / "ours"
    fingerprints = [
        model_fingerprint(ours, KvFormat.FP8),
        model_fingerprint(tmp_path / "theirs", KvFormat.FP8),
        model_fingerprint(ours, KvFormat.FP32),
        model_fingerprint(ours, KvFormat.FP8, KeyFormat.MXFP4),
        model_fingerprint(ours, KvFormat.FP8, weight_dtype=WeightDtype.BF16),
    ]
    monkeypatch.setattr(fingerprint_module, "LAYOUT_VERSION", fingerprint_module.LAYOUT_VERSION + 1)
    fingerprints.append(model_fingerprint(ours, KvFormat.FP8))
    keys = [key for fingerprint in fingerprints for key in Asker(fingerprint).block_keys]
    assert len(set(keys)) == len(keys) == 12
