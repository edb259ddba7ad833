"""The arena: one shared-memory file per host, with a header and a payload slot for every record.

The cold pool manager creates (or, after a restart, adopts) it and alone writes headers; holders map the
headers read-only and write payloads of slots they reserved. Mapped with mmap, sized by posix_fallocate,
so that lack of memory fails at the start and not as SIGBUS in the middle of a copy.

File:
    0                 superblock, one page: magic "FPARENA\\0", layout version u32, header bytes u32,
                      slot_bytes u64, num_slots u64, payload_offset u64, uuid 16 B, xxh3_64 of the above
    4096              header table, 128 B a slot (records.py)
    payload_offset    payloads, slot_bytes each; a multiple of 64 KiB, so it can be mapped on its own
"""

import errno
import mmap
import os
import stat
import struct
import uuid as uuids
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from forepage.coldpool.records import (
    HEADER_BYTES,
    LAYOUT_VERSION,
    TAG_BYTES,
    SlotHeader,
    SlotRef,
    SlotState,
    decode_header,
    encode_header_fields,
    pack_tag,
    payload_checksum,
)
from forepage.errors import CapacityError, DependencyError, IntegrityError
from forepage.kv.ids import ArenaId

MAGIC = b"FPARENA\0"
SUPERBLOCK_BYTES = 4096
PAYLOAD_ALIGN = 1 << 16
_SUPERBLOCK = struct.Struct("<8sIIQQQ16s")
_SUM = struct.Struct("<Q")
_TAG_STRIDE = HEADER_BYTES // TAG_BYTES
_WHOSE = "if another user has it, set FOREPAGE_INSTANCE or FOREPAGE_COLDPOOL__SHM_DIR"
_NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.ENOMEM)


def arena_path(shm_dir: Path, instance: str) -> Path:
    """Where the arena of an instance lies."""
    return shm_dir / f"forepage-{instance}-arena"


@dataclass(frozen=True)
class ArenaShape:
    """What the superblock says: sizes in bytes, and the uuid that a new arena gets."""

    slot_bytes: int
    num_slots: int
    uuid: str

    @property
    def payload_offset(self) -> int:
        """Byte offset of slot 0's payload in the file."""
        used = SUPERBLOCK_BYTES + self.num_slots * HEADER_BYTES
        return -(-used // PAYLOAD_ALIGN) * PAYLOAD_ALIGN

    @property
    def payload_area_bytes(self) -> int:
        """All payload slots together."""
        return self.num_slots * self.slot_bytes

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return self.payload_offset + self.payload_area_bytes

    def encode(self) -> bytes:
        """The superblock, without its padding."""
        body = _SUPERBLOCK.pack(
            MAGIC,
            LAYOUT_VERSION,
            HEADER_BYTES,
            self.slot_bytes,
            self.num_slots,
            self.payload_offset,
            uuids.UUID(self.uuid).bytes,
        )
        return body + _SUM.pack(payload_checksum(body))

    @classmethod
    def decode(cls, data: bytes) -> "ArenaShape":
        """Raises: IntegrityError unless `data` begins with a superblock of this version."""
        if len(data) < _SUPERBLOCK.size + _SUM.size or data[: len(MAGIC)] != MAGIC:
            raise IntegrityError("arena: the file has no superblock")
        magic_to_uuid = _SUPERBLOCK.unpack_from(data)
        if _SUM.unpack_from(data, _SUPERBLOCK.size)[0] != payload_checksum(data[: _SUPERBLOCK.size]):
            raise IntegrityError("arena: the superblock is damaged")
        _, version, header_bytes, slot_bytes, num_slots, payload_offset, uuid = magic_to_uuid
        shape = cls(slot_bytes, num_slots, str(uuids.UUID(bytes=uuid)))
        if (version, header_bytes, payload_offset) != (LAYOUT_VERSION, HEADER_BYTES, shape.payload_offset):
            raise IntegrityError(f"arena: layout version {version}, this program reads {LAYOUT_VERSION}")
        return shape


class ArenaView:
    """An arena mapped by a holder (or, with writable headers, by its manager).

    The mapping lives until the view and every memoryview taken from it are gone.
    """

    def __init__(self, descriptor: int, shape: ArenaShape, *, writable: bool, owner: bool = False) -> None:
        self.shape = shape
        headers = _map(descriptor, 0, shape.payload_offset, writable=owner)
        table = memoryview(headers)[SUPERBLOCK_BYTES : SUPERBLOCK_BYTES + shape.num_slots * HEADER_BYTES]
        self._headers = table
        self._tags = table.cast("Q")
        payloads = _map(descriptor, shape.payload_offset, shape.payload_area_bytes, writable=writable)
        self.buffer = memoryview(payloads)
        """Every payload, [num_slots * slot_bytes]: what torch.frombuffer wraps; page-aligned."""

    @classmethod
    def open(cls, path: Path, *, writable: bool) -> "ArenaView":
        """Map an arena made by its manager; `writable` allows writing payloads, never headers.

        Raises: DependencyError if there is none or it can't be opened, IntegrityError if it is no arena.
        """
        try:
            descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            raise DependencyError(
                f"arena {path}: {error.strerror}; does the cold pool manager run on this host, as this user?"
            ) from error
        try:
            return cls(descriptor, _read_shape(descriptor), writable=writable)
        finally:
            os.close(descriptor)

    @property
    def uuid(self) -> str:
        """Names this arena; a new one gets another."""
        return self.shape.uuid

    @property
    def slot_bytes(self) -> int:
        """Bytes from one payload to the next."""
        return self.shape.slot_bytes

    @property
    def num_slots(self) -> int:
        """Slots of the arena."""
        return self.shape.num_slots

    def payload_offset(self, arena_id: ArenaId) -> int:
        """Byte offset of a slot's payload in `buffer`."""
        if not 0 <= arena_id < self.shape.num_slots:
            raise IndexError(f"arena id {arena_id} of {self.shape.num_slots}")
        return arena_id * self.shape.slot_bytes

    def payload(self, arena_id: ArenaId) -> memoryview:
        """A slot's payload, [slot_bytes]; what it holds is known only by `matches` before and after."""
        start = self.payload_offset(arena_id)
        return self.buffer[start : start + self.shape.slot_bytes]

    def header(self, arena_id: ArenaId) -> SlotHeader:
        """A slot's header. Raises: IntegrityError if damaged (or caught while the manager rewrites it)."""
        start = self.payload_offset(arena_id) // self.shape.slot_bytes * HEADER_BYTES
        return decode_header(bytes(self._headers[start : start + HEADER_BYTES]))

    def matches(self, ref: SlotRef) -> bool:
        """Whether the slot holds this very record, complete; one atomic read of the header's tag."""
        return self._has_tag(ref, SlotState.COMPLETE)

    def holds(self, ref: SlotRef) -> bool:
        """Whether the slot is still reserved for the writer that got this ref."""
        return self._has_tag(ref, SlotState.WRITING)

    def _has_tag(self, ref: SlotRef, state: SlotState) -> bool:
        if not 0 <= ref.arena_id < self.shape.num_slots:
            return False
        tag: int = self._tags[ref.arena_id * _TAG_STRIDE]
        return tag == pack_tag(state, ref.generation)


class Arena(ArenaView):
    """The manager's own arena: the one view whose headers can be written."""

    def __init__(self, descriptor: int, shape: ArenaShape, path: Path) -> None:
        super().__init__(descriptor, shape, writable=True, owner=True)
        self.path = path

    @classmethod
    def create(cls, path: Path, *, slot_bytes: int, num_slots: int) -> "Arena":
        """Make a new arena (mode 0600), every slot free; it appears at `path` only when whole.

        Raises: CapacityError if there is no room for it, DependencyError if the folder can't be used.
        """
        shape = ArenaShape(slot_bytes, num_slots, str(uuids.uuid4()))
        unfinished = path.with_name(path.name + ".new")
        try:
            path.unlink(missing_ok=True)  # before the new one is sized: both may not fit
            unfinished.unlink(missing_ok=True)
            descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except PermissionError as error:
            raise DependencyError(f"arena {path}: {error.strerror}; {_WHOSE}") from error
        except OSError as error:
            raise DependencyError(
                f"arena {path}: {error.strerror}; set FOREPAGE_COLDPOOL__SHM_DIR to a folder in memory"
            ) from error
        try:
            os.posix_fallocate(descriptor, 0, shape.file_bytes)
            os.pwrite(descriptor, shape.encode(), 0)
            unfinished.rename(path)
            return cls(descriptor, shape, path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise _cannot_allocate(path, shape, error) from error
        finally:
            os.close(descriptor)

    @classmethod
    def try_adopt(cls, path: Path, *, slot_bytes: int, num_slots: int) -> "Arena | None":
        """The arena an earlier manager left, if it is whole and of this shape and version; else None.

        Nor is one adopted that others may open or own: /dev/shm is everybody's, and prompts would be theirs.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DependencyError(f"arena {path}: {error.strerror}; {_WHOSE}") from error
        try:
            if not _is_private(descriptor):
                return None
            shape = _read_shape(descriptor)
            if (shape.slot_bytes, shape.num_slots) != (slot_bytes, num_slots):
                return None
            return cls(descriptor, shape, path)
        except IntegrityError:
            return None
        finally:
            os.close(descriptor)

    def write_header(self, arena_id: ArenaId, header: SlotHeader) -> None:
        """Write a slot's header so that a reader sees the old one or the new one.

        Fields first, then the tag: a slot says `complete` only over its own description, also when the
        manager is killed in between.
        """
        start = arena_id * HEADER_BYTES
        if header.state is SlotState.COMPLETE and header.record is not None:
            fields = encode_header_fields(header.record, header.generation)
            self._headers[start + TAG_BYTES : start + TAG_BYTES + len(fields)] = fields
        self._tags[arena_id * _TAG_STRIDE] = pack_tag(header.state, header.generation)

    def headers(self) -> Iterator[tuple[ArenaId, SlotHeader | None]]:
        """Every slot's header; None where it is damaged."""
        for index in range(self.num_slots):
            arena_id = ArenaId(index)
            try:
                yield arena_id, self.header(arena_id)
            except IntegrityError:
                yield arena_id, None

    def unlink(self) -> None:
        """Take the file away; who maps it keeps the memory until it unmaps."""
        self.path.unlink(missing_ok=True)


def _map(descriptor: int, offset: int, length: int, *, writable: bool) -> mmap.mmap:
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    return mmap.mmap(descriptor, length, flags=mmap.MAP_SHARED, prot=protection, offset=offset)


def _is_private(descriptor: int) -> bool:
    found = os.fstat(descriptor)
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IRWXG | stat.S_IRWXO)


def _read_shape(descriptor: int) -> ArenaShape:
    """Raises: IntegrityError if the file is no whole arena."""
    shape = ArenaShape.decode(os.pread(descriptor, SUPERBLOCK_BYTES, 0))
    found = os.fstat(descriptor).st_size
    if found != shape.file_bytes:
        raise IntegrityError(f"arena: {found} bytes, the superblock wants {shape.file_bytes}")
    return shape


def _cannot_allocate(path: Path, shape: ArenaShape, error: OSError) -> CapacityError | DependencyError:
    if error.errno not in _NO_SPACE:
        return DependencyError(f"arena {path}: {error.strerror}")
    free = os.statvfs(path.parent)
    return CapacityError(
        f"arena {path}: needs {shape.file_bytes} bytes, {free.f_bavail * free.f_frsize} are free there; "
        "lower FOREPAGE_COLDPOOL__CAPACITY_BYTES or enlarge the folder (containers: --shm-size)"
    )
