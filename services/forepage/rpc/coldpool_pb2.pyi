from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RecordKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RECORD_KIND_UNSPECIFIED: _ClassVar[RecordKind]
    RECORD_KIND_BLOCK: _ClassVar[RecordKind]
    RECORD_KIND_RESUME: _ClassVar[RecordKind]
RECORD_KIND_UNSPECIFIED: RecordKind
RECORD_KIND_BLOCK: RecordKind
RECORD_KIND_RESUME: RecordKind

class SlotRef(_message.Message):
    __slots__ = ("arena_id", "generation")
    ARENA_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    arena_id: int
    generation: int
    def __init__(self, arena_id: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("holder_id", "slot_bytes", "model_fingerprint")
    HOLDER_ID_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    holder_id: str
    slot_bytes: int
    model_fingerprint: str
    def __init__(self, holder_id: _Optional[str] = ..., slot_bytes: _Optional[int] = ..., model_fingerprint: _Optional[str] = ...) -> None: ...

class AttachReply(_message.Message):
    __slots__ = ("arena_path", "arena_uuid", "slot_bytes", "num_slots", "payload_offset", "manager_epoch")
    ARENA_PATH_FIELD_NUMBER: _ClassVar[int]
    ARENA_UUID_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_OFFSET_FIELD_NUMBER: _ClassVar[int]
    MANAGER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    arena_path: str
    arena_uuid: str
    slot_bytes: int
    num_slots: int
    payload_offset: int
    manager_epoch: str
    def __init__(self, arena_path: _Optional[str] = ..., arena_uuid: _Optional[str] = ..., slot_bytes: _Optional[int] = ..., num_slots: _Optional[int] = ..., payload_offset: _Optional[int] = ..., manager_epoch: _Optional[str] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("holder_id", "count")
    HOLDER_ID_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    holder_id: str
    count: int
    def __init__(self, holder_id: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class ReserveReply(_message.Message):
    __slots__ = ("slots",)
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedCompositeFieldContainer[SlotRef]
    def __init__(self, slots: _Optional[_Iterable[_Union[SlotRef, _Mapping]]] = ...) -> None: ...

class PublishedRecord(_message.Message):
    __slots__ = ("slot", "key", "kind", "part", "num_parts", "payload_bytes", "checksum", "salted")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    NUM_PARTS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    SALTED_FIELD_NUMBER: _ClassVar[int]
    slot: SlotRef
    key: bytes
    kind: RecordKind
    part: int
    num_parts: int
    payload_bytes: int
    checksum: int
    salted: bool
    def __init__(self, slot: _Optional[_Union[SlotRef, _Mapping]] = ..., key: _Optional[bytes] = ..., kind: _Optional[_Union[RecordKind, str]] = ..., part: _Optional[int] = ..., num_parts: _Optional[int] = ..., payload_bytes: _Optional[int] = ..., checksum: _Optional[int] = ..., salted: bool = ...) -> None: ...

class PublishRequest(_message.Message):
    __slots__ = ("holder_id", "records")
    HOLDER_ID_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    holder_id: str
    records: _containers.RepeatedCompositeFieldContainer[PublishedRecord]
    def __init__(self, holder_id: _Optional[str] = ..., records: _Optional[_Iterable[_Union[PublishedRecord, _Mapping]]] = ...) -> None: ...

class PublishReply(_message.Message):
    __slots__ = ("slots",)
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedCompositeFieldContainer[SlotRef]
    def __init__(self, slots: _Optional[_Iterable[_Union[SlotRef, _Mapping]]] = ...) -> None: ...

class LeasePrefixRequest(_message.Message):
    __slots__ = ("holder_id", "block_keys", "resume_keys")
    HOLDER_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_KEYS_FIELD_NUMBER: _ClassVar[int]
    RESUME_KEYS_FIELD_NUMBER: _ClassVar[int]
    holder_id: str
    block_keys: _containers.RepeatedScalarFieldContainer[bytes]
    resume_keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, holder_id: _Optional[str] = ..., block_keys: _Optional[_Iterable[bytes]] = ..., resume_keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class LeasePrefixReply(_message.Message):
    __slots__ = ("num_blocks", "blocks", "resume_parts")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RESUME_PARTS_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    blocks: _containers.RepeatedCompositeFieldContainer[SlotRef]
    resume_parts: _containers.RepeatedCompositeFieldContainer[SlotRef]
    def __init__(self, num_blocks: _Optional[int] = ..., blocks: _Optional[_Iterable[_Union[SlotRef, _Mapping]]] = ..., resume_parts: _Optional[_Iterable[_Union[SlotRef, _Mapping]]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("holder_id", "slots")
    HOLDER_ID_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    holder_id: str
    slots: _containers.RepeatedCompositeFieldContainer[SlotRef]
    def __init__(self, holder_id: _Optional[str] = ..., slots: _Optional[_Iterable[_Union[SlotRef, _Mapping]]] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ("stale",)
    STALE_FIELD_NUMBER: _ClassVar[int]
    stale: int
    def __init__(self, stale: _Optional[int] = ...) -> None: ...

class AnnounceRequest(_message.Message):
    __slots__ = ("holder_id", "slots")
    HOLDER_ID_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    holder_id: str
    slots: _containers.RepeatedCompositeFieldContainer[SlotRef]
    def __init__(self, holder_id: _Optional[str] = ..., slots: _Optional[_Iterable[_Union[SlotRef, _Mapping]]] = ...) -> None: ...

class AnnounceReply(_message.Message):
    __slots__ = ("void",)
    VOID_FIELD_NUMBER: _ClassVar[int]
    void: _containers.RepeatedCompositeFieldContainer[SlotRef]
    def __init__(self, void: _Optional[_Iterable[_Union[SlotRef, _Mapping]]] = ...) -> None: ...

class StatRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatReply(_message.Message):
    __slots__ = ("total", "free", "writing", "leased", "cached", "evictions", "damaged", "holders")
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    WRITING_FIELD_NUMBER: _ClassVar[int]
    LEASED_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    total: int
    free: int
    writing: int
    leased: int
    cached: int
    evictions: int
    damaged: int
    holders: int
    def __init__(self, total: _Optional[int] = ..., free: _Optional[int] = ..., writing: _Optional[int] = ..., leased: _Optional[int] = ..., cached: _Optional[int] = ..., evictions: _Optional[int] = ..., damaged: _Optional[int] = ..., holders: _Optional[int] = ...) -> None: ...
