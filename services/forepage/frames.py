"""What crosses Redis in msgpack: published plans, directory entries, worker cards.

Each frame is a frozen dataclass with a `schema_version`; other versions are refused by name. Decoding
checks types and bounds: bytes from Redis are outside input.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self, get_type_hints

import msgpack

from forepage.errors import IntegrityError

MAX_FRAME_BYTES = 4 << 20


@dataclass(frozen=True)
class Frame:
    """Base of the frames: encode and decode with version and field checks."""

    FRAME: ClassVar[str] = ""
    SCHEMA_VERSION: ClassVar[int] = 1

    def encode(self) -> bytes:
        """msgpack map: `frame`, `schema_version`, then the fields by name."""
        body = {"frame": self.FRAME, "schema_version": self.SCHEMA_VERSION, **asdict(self)}
        packed: bytes = msgpack.packb(body, use_bin_type=True)
        return packed

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Raises: IntegrityError for another frame or version, missing, unknown or mistyped fields."""
        body = _unpack(data, cls.FRAME)
        found = (body.pop("frame", None), body.pop("schema_version", None))
        if found != (cls.FRAME, cls.SCHEMA_VERSION):
            raise IntegrityError(
                f"frame {found[0]!r} v{found[1]!r}; wanted {cls.FRAME!r} v{cls.SCHEMA_VERSION}"
            )
        hints = get_type_hints(cls)
        names = [item.name for item in fields(cls)]
        if set(body) != set(names):
            raise IntegrityError(
                f"frame {cls.FRAME!r}: fields {sorted(map(str, body))}, wanted {sorted(names)}"
            )
        return cls(**{name: _checked(cls.FRAME, name, body[name], hints[name]) for name in names})


@dataclass(frozen=True)
class PlanFrame(Frame):
    """A prefetch plan as observers see it on the stream; workers obey only the gRPC stream."""

    FRAME: ClassVar[str] = "plan"

    sequence_id: str
    incarnation: int
    interval: int
    num_tokens: int
    block_idx: tuple[int, ...]
    score: tuple[float, ...]
    num_above_threshold: int
    traceparent: str


@dataclass(frozen=True)
class DirectoryFrame(Frame):
    """Who has a record, where, which generation. `arena_id` is -1 for a record that is only in a tier."""

    FRAME: ClassVar[str] = "directory"

    host: str
    instance: str
    tier: str
    arena_id: int
    generation: int
    layout_version: int
    kind: int
    part: int
    num_parts: int
    payload_bytes: int
    checksum: int


@dataclass(frozen=True)
class WorkerFrame(Frame):
    """A worker's card in the directory; it expires unless renewed."""

    FRAME: ClassVar[str] = "worker"

    worker_id: str
    address: str
    model_name: str
    model_fingerprint: str
    max_context_tokens: int
    draining: bool


def _unpack(data: bytes, frame: str) -> dict[str, Any]:
    if len(data) > MAX_FRAME_BYTES:
        raise IntegrityError(f"frame {frame!r}: {len(data)} bytes, at most {MAX_FRAME_BYTES}")
    try:
        body = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as error:
        raise IntegrityError(f"frame {frame!r}: not msgpack ({error})") from error
    if not isinstance(body, dict):
        raise IntegrityError(f"frame {frame!r}: not a map")
    return body


def _checked(frame: str, name: str, value: Any, hint: Any) -> Any:
    """`value` as the hint wants it; only the few types that frames use."""
    if hint in (tuple[int, ...], tuple[float, ...]):
        item = int if hint == tuple[int, ...] else (int, float)
        if isinstance(value, list | tuple) and all(
            isinstance(v, item) and not isinstance(v, bool) for v in value
        ):
            return tuple(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise IntegrityError(f"frame {frame!r}: field {name} is not {hint}")
