"""The exact bytes of headers and tier records: a change of layout must be a change of version."""

import pytest

from forepage.coldpool.records import (
    LAYOUT_VERSION,
    RecordInfo,
    RecordKind,
    SlotState,
    decode_record,
    encode_header_fields,
    encode_record,
    key_from_hex,
    pack_tag,
    payload_checksum,
)
from forepage.errors import IntegrityError

PAYLOAD = b"rows, keys, c128 rows"
KEY = bytes(range(32))
RECORD = RecordInfo(KEY, RecordKind.RESUME, 1, 3, len(PAYLOAD), payload_checksum(PAYLOAD), salted=True)


def test_checksum_is_xxh3_64() -> None:
    assert payload_checksum(b"") == 0x2D06800538D394C2  # xxHash's own test vector
    assert payload_checksum(memoryview(PAYLOAD)) == payload_checksum(PAYLOAD)


def test_header_bytes_are_golden() -> None:
    assert LAYOUT_VERSION == 1
    assert pack_tag(SlotState.COMPLETE, 5) == 22
    assert encode_header_fields(RECORD, 5).hex() == (
        "01000000"
        "02"
        "01"
        "0000"
        "01000000"
        "03000000"
        "1500000000000000"
        + payload_checksum(PAYLOAD).to_bytes(8, "little").hex()
        + KEY.hex()
        + encode_header_fields(RECORD, 5)[-8:].hex()
    )


def test_record_of_another_version_is_refused_by_name() -> None:
    encoded = bytearray(encode_record(RECORD, PAYLOAD))
    encoded[8] = 9
    encoded[72:80] = payload_checksum(bytes(encoded[:72])).to_bytes(8, "little")
    with pytest.raises(IntegrityError, match="layout version 9"):
        decode_record(encoded, key=KEY)


def test_record_under_another_name_is_refused() -> None:
    with pytest.raises(IntegrityError, match="another record"):
        decode_record(encode_record(RECORD, PAYLOAD), key=bytes(32))


def test_record_is_not_encoded_over_a_payload_that_changed() -> None:
    with pytest.raises(IntegrityError, match="checksum"):
        encode_record(RECORD, PAYLOAD.upper())
    with pytest.raises(IntegrityError, match="bytes"):
        encode_record(RECORD, PAYLOAD[1:])


@pytest.mark.parametrize("name", ["", "abc", "zz" * 32, "00" * 31, "00" * 33])
def test_names_that_spell_no_key_are_ignored(name: str) -> None:
    assert key_from_hex(name) is None


def test_names_spell_keys() -> None:
    assert key_from_hex(KEY.hex()) == KEY
