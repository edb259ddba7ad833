"""Between coldpool.proto and our own values: what comes in is checked here, once, for both sides."""

from collections.abc import Iterable, Sequence

from forepage.coldpool.records import KEY_BYTES, PublishedRecord, RecordKind, SlotRef
from forepage.errors import RequestError
from forepage.kv.ids import ArenaId
from forepage.rpc import coldpool_pb2 as pb

MAX_KEYS = 1 << 16
"""Keys of one LeasePrefix: four times the blocks of a 4M-token prompt."""


def refs_from_wire(refs: Iterable[pb.SlotRef]) -> list[SlotRef]:
    """Slot refs as values."""
    return [SlotRef(ArenaId(ref.arena_id), ref.generation) for ref in refs]


def refs_to_wire(refs: Iterable[SlotRef]) -> list[pb.SlotRef]:
    """Slot refs as messages."""
    return [pb.SlotRef(arena_id=ref.arena_id, generation=ref.generation) for ref in refs]


def record_to_wire(record: PublishedRecord) -> pb.PublishedRecord:
    """A published record as a message."""
    return pb.PublishedRecord(
        slot=pb.SlotRef(arena_id=record.slot.arena_id, generation=record.slot.generation),
        key=record.key,
        kind=f"RECORD_KIND_{record.kind.name}",
        part=record.part,
        num_parts=record.num_parts,
        payload_bytes=record.payload_bytes,
        checksum=record.checksum,
        salted=record.salted,
    )


def records_from_wire(records: Iterable[pb.PublishedRecord]) -> list[PublishedRecord]:
    """Published records as values. Raises: RequestError for a key, kind or part out of range."""
    return [_record_from_wire(record) for record in records]


def block_keys_from_wire(keys: Sequence[bytes]) -> list[bytes]:
    """Raises: RequestError unless they are distinct keys, and not too many."""
    if len(keys) > MAX_KEYS or len(set(keys)) != len(keys) or any(len(key) != KEY_BYTES for key in keys):
        raise RequestError(f"block_keys: at most {MAX_KEYS} different keys of {KEY_BYTES} B", "block_keys")
    return list(keys)


def resume_keys_from_wire(resume_keys: Sequence[bytes], num_blocks: int) -> list[list[bytes]]:
    """The part keys of each resume record. Raises: RequestError unless there is an item for each block."""
    if len(resume_keys) != num_blocks or any(len(parts) % KEY_BYTES for parts in resume_keys):
        raise RequestError(f"resume_keys: one item a block, whole keys of {KEY_BYTES} B", "resume_keys")
    return [
        [parts[start : start + KEY_BYTES] for start in range(0, len(parts), KEY_BYTES)]
        for parts in resume_keys
    ]


def _record_from_wire(record: pb.PublishedRecord) -> PublishedRecord:
    if len(record.key) != KEY_BYTES or int(record.kind) not in tuple(map(int, RecordKind)):
        raise RequestError(f"records: kind {record.kind} or a key that has not {KEY_BYTES} B", "records")
    if record.part >= record.num_parts:
        raise RequestError(f"records: part {record.part} of {record.num_parts}", "records")
    return PublishedRecord(
        slot=SlotRef(ArenaId(record.slot.arena_id), record.slot.generation),
        key=record.key,
        kind=RecordKind(int(record.kind)),
        part=record.part,
        num_parts=record.num_parts,
        payload_bytes=record.payload_bytes,
        checksum=record.checksum,
        salted=record.salted,
    )
