"""Bytes of a slot header in the arena, and of a whole record in a tier (disk, Redis).

Both carry the same description of the record, with a sum of its own, so that a damaged description is
refused before its payload is looked at. Little-endian throughout.

Slot header, 128 B:
    0    8   tag             generation << 2 | state; one aligned word, so a reader never sees half of it
    8    4   layout_version  of the description that follows
    12   1   kind            1 block, 2 part of a resume record
    13   1   flags           bit 0: salted
    14   2   zero
    16   4   part
    20   4   num_parts
    24   8   payload_bytes
    32   8   checksum        xxh3_64 of the payload
    40  32   key
    72   8   header_sum      xxh3_64 of the generation (8 B) and bytes 8..72
    80  48   zero
The fields behind the tag mean something only in states `complete` and `damaged`.

Record in a tier:
    0    8   magic           b"FPRECORD"
    8   64   the description: bytes 8..72 of the table above
    72   8   header_sum      xxh3_64 of bytes 0..72
    80   -   payload         payload_bytes, to the end
"""

import struct
from dataclasses import dataclass, replace
from enum import IntEnum

import xxhash

from forepage.errors import IntegrityError
from forepage.kv.ids import ArenaId

LAYOUT_VERSION = 1
"""Of slot headers, the superblock and tier records; another version is refused, never guessed at."""
HEADER_BYTES = 128
TAG_BYTES = 8
KEY_BYTES = 32
STATE_BITS = 2
MAX_GENERATION = (1 << (64 - STATE_BITS)) - 1
RECORD_MAGIC = b"FPRECORD"
RECORD_PREFIX_BYTES = 80

_DESCRIPTION = struct.Struct("<IBBHIIQQ32s")
_U64 = struct.Struct("<Q")
_SUM_AT = TAG_BYTES + _DESCRIPTION.size
_SALTED = 1


BytesLike = bytes | bytearray | memoryview


class SlotState(IntEnum):
    """What a slot's header says; only `complete` may be read as a record."""

    FREE = 0
    WRITING = 1
    COMPLETE = 2
    DAMAGED = 3
    """Was complete, failed its checksum while leased: no longer found, freed with its last lease."""


class RecordKind(IntEnum):
    """What a record holds; numbers as in coldpool.proto."""

    BLOCK = 1
    RESUME = 2


@dataclass(frozen=True, slots=True)
class SlotRef:
    """One slot at one generation; any other generation in the header means: not this record."""

    arena_id: ArenaId
    generation: int


@dataclass(frozen=True, slots=True)
class RecordInfo:
    """A record's description. `checksum` is xxh3_64 of the payload, taken by its writer."""

    key: bytes
    kind: RecordKind
    part: int
    num_parts: int
    payload_bytes: int
    checksum: int
    salted: bool = False


@dataclass(frozen=True, slots=True)
class PublishedRecord:
    """A slot that its writer has filled, and what it now holds (fields as in RecordInfo)."""

    slot: SlotRef
    key: bytes
    kind: RecordKind
    part: int
    num_parts: int
    payload_bytes: int
    checksum: int
    salted: bool = False

    @property
    def info(self) -> RecordInfo:
        """The description without the place."""
        return RecordInfo(
            self.key, self.kind, self.part, self.num_parts, self.payload_bytes, self.checksum, self.salted
        )

    def with_checksum(self, checksum: int) -> "PublishedRecord":
        """The same, once the payload has been summed."""
        return replace(self, checksum=checksum)


@dataclass(frozen=True, slots=True)
class SlotHeader:
    """A decoded slot header; `record` is None unless the slot is complete or damaged."""

    state: SlotState
    generation: int
    record: RecordInfo | None = None


def key_from_hex(name: str) -> bytes | None:
    """The key that a tier's name for a record spells; None if it spells none."""
    try:
        key = bytes.fromhex(name)
    except ValueError:
        return None
    return key if len(key) == KEY_BYTES else None


def payload_checksum(payload: BytesLike) -> int:
    """xxh3_64 of a payload: what publishers send and every check compares with."""
    digest: int = xxhash.xxh3_64_intdigest(payload)
    return digest


def pack_tag(state: SlotState, generation: int) -> int:
    """The header's first word."""
    return generation << STATE_BITS | state


def unpack_tag(tag: int) -> tuple[SlotState, int]:
    """State and generation of a header's first word."""
    return SlotState(tag & ((1 << STATE_BITS) - 1)), tag >> STATE_BITS


def encode_header_fields(record: RecordInfo, generation: int) -> bytes:
    """Bytes 8..80 of a slot header: all but the tag."""
    described = _describe(record)
    return described + _U64.pack(_header_sum(_U64.pack(generation) + described))


def decode_header(data: BytesLike) -> SlotHeader:
    """Read a slot header. Raises: IntegrityError if its fields are damaged or of another version."""
    if len(data) != HEADER_BYTES:
        raise IntegrityError(f"slot header: {len(data)} bytes, wanted {HEADER_BYTES}")
    state, generation = unpack_tag(_U64.unpack_from(data, 0)[0])
    if state in (SlotState.FREE, SlotState.WRITING):
        return SlotHeader(state, generation)
    described = bytes(data[TAG_BYTES:_SUM_AT])
    if _U64.unpack_from(data, _SUM_AT)[0] != _header_sum(_U64.pack(generation) + described):
        raise IntegrityError("slot header: its sum does not match its fields")
    return SlotHeader(state, generation, _read_description(described, "slot header"))


def encode_record(record: RecordInfo, payload: BytesLike) -> bytes:
    """A whole record for a tier. Raises: IntegrityError if the payload does not match its description."""
    _check_payload(record, payload, "record to store")
    described = RECORD_MAGIC + _describe(record)
    return b"".join((described, _U64.pack(_header_sum(described)), payload))


def decode_record(data: BytesLike, *, key: bytes) -> tuple[RecordInfo, memoryview]:
    """Read a record that a tier returned for `key`: its description and a view of its payload.

    Raises: IntegrityError for damage anywhere, another version or key, missing or trailing bytes.
    """
    if len(data) < RECORD_PREFIX_BYTES or bytes(data[:TAG_BYTES]) != RECORD_MAGIC:
        raise IntegrityError("stored record: not a record of ours, or cut short")
    described = bytes(data[:_SUM_AT])
    if _U64.unpack_from(data, _SUM_AT)[0] != _header_sum(described):
        raise IntegrityError("stored record: its header is damaged")
    record = _read_description(described[TAG_BYTES:], "stored record")
    if record.key != key:
        raise IntegrityError("stored record: it is another record than its name says")
    payload = memoryview(data)[RECORD_PREFIX_BYTES:]
    _check_payload(record, payload, "stored record")
    return record, payload


def _describe(record: RecordInfo) -> bytes:
    if len(record.key) != KEY_BYTES:
        raise IntegrityError(f"record key: {len(record.key)} bytes, wanted {KEY_BYTES}")
    return _DESCRIPTION.pack(
        LAYOUT_VERSION,
        record.kind,
        _SALTED if record.salted else 0,
        0,
        record.part,
        record.num_parts,
        record.payload_bytes,
        record.checksum,
        record.key,
    )


def _read_description(described: bytes, what: str) -> RecordInfo:
    version, kind, flags, zero, part, num_parts, payload_bytes, checksum, key = _DESCRIPTION.unpack(described)
    if version != LAYOUT_VERSION:
        raise IntegrityError(f"{what}: layout version {version}, this program reads {LAYOUT_VERSION}")
    if kind not in tuple(RecordKind) or flags & ~_SALTED or zero or part >= num_parts:
        raise IntegrityError(f"{what}: fields out of range (kind {kind}, flags {flags}, part {part})")
    return RecordInfo(
        key, RecordKind(kind), part, num_parts, payload_bytes, checksum, salted=bool(flags & _SALTED)
    )


def _check_payload(record: RecordInfo, payload: BytesLike, what: str) -> None:
    if len(payload) != record.payload_bytes:
        raise IntegrityError(f"{what}: {len(payload)} payload bytes, described are {record.payload_bytes}")
    if payload_checksum(payload) != record.checksum:
        raise IntegrityError(f"{what}: its payload does not match its checksum")


def _header_sum(data: bytes) -> int:
    digest: int = xxhash.xxh3_64_intdigest(data)
    return digest
