"""The arena file: made whole or not at all, adopted only if it fits, headers out of holders' reach."""

import errno
import os
import stat
from pathlib import Path

import pytest

from forepage.coldpool.arena import Arena, ArenaView, arena_path
from forepage.coldpool.records import RecordInfo, RecordKind, SlotHeader, SlotRef, SlotState
from forepage.errors import CapacityError, DependencyError, IntegrityError
from forepage.kv.ids import ArenaId

SLOT_BYTES, NUM_SLOTS = 8192, 4
RECORD = RecordInfo(b"k" * 32, RecordKind.BLOCK, 0, 1, 100, 7)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return arena_path(tmp_path, "test")


@pytest.fixture
def arena(path: Path) -> Arena:
    return Arena.create(path, slot_bytes=SLOT_BYTES, num_slots=NUM_SLOTS)


def test_new_arena_is_private_allocated_and_free(path: Path, arena: Arena) -> None:
    found = path.stat()
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_size == arena.shape.file_bytes <= found.st_blocks * 512
    assert [header for _, header in arena.headers()] == [SlotHeader(SlotState.FREE, 0)] * NUM_SLOTS
    assert os.listdir(path.parent) == [path.name]


def test_holder_sees_headers_and_payloads_of_the_manager(path: Path, arena: Arena) -> None:
    view = ArenaView.open(path, writable=True)
    ref = SlotRef(ArenaId(2), 41)
    arena.write_header(ref.arena_id, SlotHeader(SlotState.WRITING, 41))
    assert (view.holds(ref), view.matches(ref)) == (True, False)
    view.payload(ref.arena_id)[:5] = b"bytes"
    arena.write_header(ref.arena_id, SlotHeader(SlotState.COMPLETE, 41, RECORD))
    assert (view.holds(ref), view.matches(ref)) == (False, True)
    assert view.header(ref.arena_id) == SlotHeader(SlotState.COMPLETE, 41, RECORD)
    assert bytes(arena.payload(ref.arena_id)[:5]) == b"bytes"
    assert view.uuid == arena.uuid


@pytest.mark.parametrize(
    "ref", [SlotRef(ArenaId(0), 6), SlotRef(ArenaId(1), 5), SlotRef(ArenaId(-1), 5), SlotRef(ArenaId(4), 5)]
)
def test_view_matches_only_its_slot_and_generation(path: Path, arena: Arena, ref: SlotRef) -> None:
    arena.write_header(ArenaId(0), SlotHeader(SlotState.COMPLETE, 5, RECORD))
    view = ArenaView.open(path, writable=False)
    assert view.matches(SlotRef(ArenaId(0), 5))
    assert not view.matches(ref)
    assert not view.holds(ref)


def test_damaged_record_does_not_match(path: Path, arena: Arena) -> None:
    arena.write_header(ArenaId(0), SlotHeader(SlotState.COMPLETE, 5, RECORD))
    arena.write_header(ArenaId(0), SlotHeader(SlotState.DAMAGED, 5, RECORD))
    assert not ArenaView.open(path, writable=False).matches(SlotRef(ArenaId(0), 5))


def test_buffer_is_the_payload_area_page_aligned(path: Path, arena: Arena) -> None:
    view = ArenaView.open(path, writable=True)
    assert len(view.buffer) == NUM_SLOTS * SLOT_BYTES
    assert arena.shape.payload_offset % 4096 == 0
    view.buffer[view.payload_offset(ArenaId(3))] = 77
    assert arena.payload(ArenaId(3))[0] == 77
    with pytest.raises(IndexError):
        view.payload_offset(ArenaId(4))


def test_reader_can_not_write_payloads_nor_any_holder_headers(path: Path, arena: Arena) -> None:
    arena.write_header(ArenaId(0), SlotHeader(SlotState.COMPLETE, 5, RECORD))
    reader = ArenaView.open(path, writable=False)
    assert reader.buffer.readonly
    holder = ArenaView.open(path, writable=True)
    assert not holder.buffer.readonly
    assert holder._headers.readonly


def test_adoption_keeps_uuid_headers_and_payloads(path: Path, arena: Arena) -> None:
    arena.write_header(ArenaId(1), SlotHeader(SlotState.COMPLETE, 9, RECORD))
    arena.payload(ArenaId(1))[:3] = b"abc"
    adopted = Arena.try_adopt(path, slot_bytes=SLOT_BYTES, num_slots=NUM_SLOTS)
    assert adopted is not None
    assert adopted.uuid == arena.uuid
    assert adopted.header(ArenaId(1)) == SlotHeader(SlotState.COMPLETE, 9, RECORD)
    assert bytes(adopted.payload(ArenaId(1))[:3]) == b"abc"


@pytest.mark.parametrize(("slot_bytes", "num_slots"), [(4096, NUM_SLOTS), (SLOT_BYTES, NUM_SLOTS + 1)])
def test_arena_of_another_shape_is_not_adopted(
    path: Path, arena: Arena, slot_bytes: int, num_slots: int
) -> None:
    assert Arena.try_adopt(path, slot_bytes=slot_bytes, num_slots=num_slots) is None
    replaced = Arena.create(path, slot_bytes=slot_bytes, num_slots=num_slots)
    assert ArenaView.open(path, writable=False).uuid == replaced.uuid != arena.uuid


@pytest.mark.usefixtures("arena")
@pytest.mark.parametrize("where", [0, 8, 20, 40, 60])
def test_arena_with_a_damaged_superblock_is_not_adopted(path: Path, where: int) -> None:
    with path.open("r+b") as file:
        file.seek(where)
        file.write(b"\xff")
    assert Arena.try_adopt(path, slot_bytes=SLOT_BYTES, num_slots=NUM_SLOTS) is None
    with pytest.raises(IntegrityError):
        ArenaView.open(path, writable=False)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_arena_that_others_may_open_is_not_adopted(path: Path, arena: Arena, mode: int) -> None:
    path.chmod(mode)
    assert Arena.try_adopt(path, slot_bytes=SLOT_BYTES, num_slots=NUM_SLOTS) is None
    replaced = Arena.create(path, slot_bytes=SLOT_BYTES, num_slots=NUM_SLOTS)
    assert replaced.uuid != arena.uuid
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_arena_of_another_user_is_not_adopted(
    path: Path, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert Arena.try_adopt(path, slot_bytes=SLOT_BYTES, num_slots=NUM_SLOTS) is None
    monkeypatch.setattr(os, "geteuid", lambda: owner)
    adopted = Arena.try_adopt(path, slot_bytes=SLOT_BYTES, num_slots=NUM_SLOTS)
    assert adopted is not None
    assert adopted.uuid == arena.uuid


def test_arena_in_the_way_of_another_user_names_the_settings(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DependencyError, match="FOREPAGE_INSTANCE"):
        Arena.try_adopt(path, slot_bytes=SLOT_BYTES, num_slots=NUM_SLOTS)
    with pytest.raises(DependencyError, match="FOREPAGE_INSTANCE"):
        Arena.create(path, slot_bytes=SLOT_BYTES, num_slots=NUM_SLOTS)


def test_cut_off_arena_is_not_adopted(path: Path, arena: Arena) -> None:
    os.truncate(path, arena.shape.file_bytes - 1)
    assert Arena.try_adopt(path, slot_bytes=SLOT_BYTES, num_slots=NUM_SLOTS) is None


def test_damaged_header_is_told_apart_at_adoption(path: Path, arena: Arena) -> None:
    arena.write_header(ArenaId(1), SlotHeader(SlotState.COMPLETE, 9, RECORD))
    with path.open("r+b") as file:
        file.seek(4096 + 128 + 40)  # within the key of slot 1
        file.write(b"?")
    adopted = Arena.try_adopt(path, slot_bytes=SLOT_BYTES, num_slots=NUM_SLOTS)
    assert adopted is not None
    assert [header is None for _, header in adopted.headers()] == [False, True, False, False]


def test_arena_without_room_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="FOREPAGE_COLDPOOL__CAPACITY_BYTES"):
        Arena.create(arena_path(tmp_path, "huge"), slot_bytes=1 << 40, num_slots=1 << 10)
    assert os.listdir(tmp_path) == []


def test_arena_in_a_missing_folder_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(DependencyError, match="FOREPAGE_COLDPOOL__SHM_DIR"):
        Arena.create(arena_path(tmp_path / "none", "test"), slot_bytes=4096, num_slots=1)


def test_missing_arena_is_a_missing_dependency(path: Path) -> None:
    assert Arena.try_adopt(path, slot_bytes=SLOT_BYTES, num_slots=NUM_SLOTS) is None
    with pytest.raises(DependencyError, match="cold pool manager"):
        ArenaView.open(path, writable=False)


def test_old_mapping_outlives_the_file(path: Path, arena: Arena) -> None:
    view = ArenaView.open(path, writable=True)
    arena.unlink()
    arena.unlink()
    view.payload(ArenaId(0))[:2] = b"ok"
    assert bytes(arena.payload(ArenaId(0))[:2]) == b"ok"
    assert not path.exists()
