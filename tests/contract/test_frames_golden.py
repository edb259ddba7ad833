"""The bytes of every frame on Redis: a change of one is a new schema version, never an accident."""

from dataclasses import asdict
from typing import Any

import msgpack
import pytest

from forepage.errors import IntegrityError
from forepage.frames import MAX_FRAME_BYTES, DirectoryFrame, Frame, PlanFrame, WorkerFrame

PLAN = PlanFrame(
    sequence_id="seq-1",
    incarnation=2,
    interval=3,
    num_tokens=4096,
    block_idx=(7, 1),
    score=(0.75, 0.5),
    num_above_threshold=2,
    traceparent="",
)
DIRECTORY = DirectoryFrame(
    host="host-1",
    instance="default",
    tier="arena",
    arena_id=5,
    generation=1 << 40,
    layout_version=1,
    kind=1,
    part=0,
    num_parts=1,
    payload_bytes=1024,
    checksum=(1 << 64) - 1,
)
WORKER = WorkerFrame(
    worker_id="worker-0",
    address="127.0.0.1:7103",
    model_name="forepage-seeded",
    model_fingerprint="abc",
    max_context_tokens=1 << 20,
    draining=False,
)
GOLDEN: dict[str, tuple[Frame, str]] = {
    "plan-v1": (
        PLAN,
        "8aa56672616d65a4706c616eae736368656d615f76657273696f6e01ab73657175656e63655f6964a57365712d31"
        "ab696e6361726e6174696f6e02a8696e74657276616c03aa6e756d5f746f6b656e73cd1000a9626c6f636b5f6964"
        "78920701a573636f726592cb3fe8000000000000cb3fe0000000000000b36e756d5f61626f76655f746872657368"
        "6f6c6402ab7472616365706172656e74a0",
    ),
    "directory-v1": (
        DIRECTORY,
        "8da56672616d65a96469726563746f7279ae736368656d615f76657273696f6e01a4686f7374a6686f73742d31a8"
        "696e7374616e6365a764656661756c74a474696572a56172656e61a86172656e615f696405aa67656e6572617469"
        "6f6ecf0000010000000000ae6c61796f75745f76657273696f6e01a46b696e6401a47061727400a96e756d5f7061"
        "72747301ad7061796c6f61645f6279746573cd0400a8636865636b73756dcfffffffffffffffff",
    ),
    "worker-v1": (
        WORKER,
        "88a56672616d65a6776f726b6572ae736368656d615f76657273696f6e01a9776f726b65725f6964a8776f726b65"
        "722d30a761646472657373ae3132372e302e302e313a37313033aa6d6f64656c5f6e616d65af666f726570616765"
        "2d736565646564b16d6f64656c5f66696e6765727072696e74a3616263b26d61785f636f6e746578745f746f6b65"
        "6e73ce00100000a8647261696e696e67c2",
    ),
}
each_frame = pytest.mark.parametrize(("frame", "golden"), GOLDEN.values(), ids=GOLDEN)


def changed(frame: Frame, **fields: Any) -> bytes:
    """The frame's bytes with some fields replaced or added; None removes one."""
    body = {"frame": frame.FRAME, "schema_version": frame.SCHEMA_VERSION, **asdict(frame), **fields}
    packed: bytes = msgpack.packb({name: value for name, value in body.items() if value is not None})
    return packed


def test_every_frame_has_golden_bytes() -> None:
    assert {type(frame) for frame, _ in GOLDEN.values()} == set(Frame.__subclasses__())


@each_frame
def test_frame_encodes_to_its_golden_bytes(frame: Frame, golden: str) -> None:
    assert frame.encode().hex() == golden


@each_frame
def test_golden_bytes_decode_to_the_frame(frame: Frame, golden: str) -> None:
    assert type(frame).decode(bytes.fromhex(golden)) == frame


@each_frame
def test_other_versions_are_refused_by_name(frame: Frame, golden: str) -> None:
    assert golden
    for version in (0, frame.SCHEMA_VERSION + 1, "1"):
        with pytest.raises(IntegrityError, match=rf"v{version!r}; wanted '{frame.FRAME}' v1"):
            type(frame).decode(changed(frame, schema_version=version))


@each_frame
def test_another_frame_is_refused_by_name(frame: Frame, golden: str) -> None:
    for other, _ in GOLDEN.values():
        if type(other) is not type(frame):
            with pytest.raises(IntegrityError, match=f"frame '{other.FRAME}'"):
                type(frame).decode(other.encode())
    assert golden


@each_frame
def test_unknown_missing_and_mistyped_fields_are_refused(frame: Frame, golden: str) -> None:
    assert golden
    with pytest.raises(IntegrityError, match="surprise"):
        type(frame).decode(changed(frame, surprise=1))
    for name in asdict(frame):
        with pytest.raises(IntegrityError, match=name):
            type(frame).decode(changed(frame, **{name: None}))
        with pytest.raises(IntegrityError, match=name):
            type(frame).decode(changed(frame, **{name: {"not": "this"}}))


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x93\x01\x02\x03", b"\xff" * 10], ids=bytes.hex)
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        PlanFrame.decode(data)


def test_oversized_frame_is_refused_before_it_is_unpacked() -> None:
    with pytest.raises(IntegrityError, match="at most"):
        PlanFrame.decode(b"\x00" * (MAX_FRAME_BYTES + 1))
