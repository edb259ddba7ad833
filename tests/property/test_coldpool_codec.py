"""Record and header codecs: what was written comes back, and nothing else is accepted."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forepage.coldpool.records import (
    HEADER_BYTES,
    TAG_BYTES,
    PublishedRecord,
    RecordInfo,
    RecordKind,
    SlotHeader,
    SlotRef,
    SlotState,
    decode_header,
    decode_record,
    encode_header_fields,
    encode_record,
    pack_tag,
    payload_checksum,
    unpack_tag,
)
from forepage.coldpool.slot_table import SlotTable
from forepage.coldpool.wire import record_to_wire, records_from_wire
from forepage.errors import IntegrityError
from forepage.rpc import coldpool_pb2 as pb

payloads = st.binary(max_size=300)
generations = st.integers(0, (1 << 62) - 1)


@st.composite
def records(draw: st.DrawFn, payload: bytes = b"") -> RecordInfo:
    num_parts = draw(st.integers(1, 2**32 - 1))
    return RecordInfo(
        key=draw(st.binary(min_size=32, max_size=32)),
        kind=draw(st.sampled_from(RecordKind)),
        part=draw(st.integers(0, num_parts - 1)),
        num_parts=num_parts,
        payload_bytes=len(payload),
        checksum=payload_checksum(payload),
        salted=draw(st.booleans()),
    )


def header_bytes(header: SlotHeader) -> bytearray:
    data = bytearray(HEADER_BYTES)
    data[:TAG_BYTES] = pack_tag(header.state, header.generation).to_bytes(TAG_BYTES, "little")
    if header.record is not None:
        fields = encode_header_fields(header.record, header.generation)
        data[TAG_BYTES : TAG_BYTES + len(fields)] = fields
    return data


@given(payload=payloads, data=st.data())
def test_record_comes_back_whole(payload: bytes, data: st.DataObject) -> None:
    record = data.draw(records(payload))
    decoded, its_payload = decode_record(encode_record(record, payload), key=record.key)
    assert (decoded, bytes(its_payload)) == (record, payload)


@given(payload=payloads, data=st.data())
def test_record_with_any_changed_byte_is_refused(payload: bytes, data: st.DataObject) -> None:
    record = data.draw(records(payload))
    encoded = bytearray(encode_record(record, payload))
    position = data.draw(st.integers(0, len(encoded) - 1))
    encoded[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(IntegrityError):
        decode_record(encoded, key=record.key)


@given(payload=payloads, data=st.data())
def test_record_of_another_length_is_refused(payload: bytes, data: st.DataObject) -> None:
    record = data.draw(records(payload))
    encoded = encode_record(record, payload)
    cut = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(IntegrityError):
        decode_record(encoded[:cut], key=record.key)
    with pytest.raises(IntegrityError):
        decode_record(encoded + data.draw(st.binary(min_size=1, max_size=9)), key=record.key)


@given(noise=st.binary(max_size=400))
def test_noise_is_no_record(noise: bytes) -> None:
    with pytest.raises(IntegrityError):
        decode_record(noise, key=bytes(32))


@given(state=st.sampled_from(SlotState), generation=generations, record=records())
def test_header_comes_back(state: SlotState, generation: int, record: RecordInfo) -> None:
    has_record = state in (SlotState.COMPLETE, SlotState.DAMAGED)
    header = SlotHeader(state, generation, record if has_record else None)
    assert decode_header(header_bytes(header)) == header
    assert unpack_tag(pack_tag(state, generation)) == (state, generation)


@given(generation=generations, record=records(), data=st.data())
def test_header_with_any_changed_field_is_never_another_record(
    generation: int, record: RecordInfo, data: st.DataObject
) -> None:
    header = SlotHeader(SlotState.COMPLETE, generation, record)
    damaged = header_bytes(header)
    position = data.draw(st.integers(0, 79))  # the rest is padding
    damaged[position] ^= data.draw(st.integers(1, 255))
    try:
        found = decode_header(damaged)
    except IntegrityError:
        return
    # The state's two bits are outside the sum: they can hide a record, not change it.
    assert found.record is None or (found.generation, found.record) == (generation, record)


@given(payload=payloads, data=st.data(), arena_id=st.integers(0, 2**32 - 1), generation=generations)
def test_published_record_survives_the_wire(
    payload: bytes, data: st.DataObject, arena_id: int, generation: int
) -> None:
    info = data.draw(records(payload))
    record = PublishedRecord(
        SlotRef(arena_id, generation),  # type: ignore[arg-type]
        info.key,
        info.kind,
        info.part,
        info.num_parts,
        info.payload_bytes,
        checksum=0,
        salted=info.salted,
    ).with_checksum(info.checksum)
    sent = pb.PublishedRecord.FromString(record_to_wire(record).SerializeToString())
    assert records_from_wire([sent]) == [record]
    assert record.info == info


@settings(max_examples=30)
@given(count=st.integers(1, 20), first=generations.filter(lambda number: number < 1 << 61))
def test_generations_are_never_handed_out_twice(count: int, first: int) -> None:
    table = SlotTable(1, first_generation=first)
    seen = set()
    for _ in range(count):
        ref = table.open()
        seen.add(ref.generation)
        table.free(ref.arena_id)
    assert len(seen) == count
    assert min(seen) == first
