"""What changes a rank's device state, as values: every rank carries out the same ones in the same order.

On the wire a batch is one msgpack map `{"v": 1, "commands": [[op, field...], ...]}`; a command's fields come
in the order of its dataclass. Nothing else is sent from rank 0 to the others: block payloads and resume
records they read from the arena themselves.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, ClassVar

import msgpack

from forepage.errors import IntegrityError

VERSION = 1
SKIP = -1
ALL_PARTS = 1 << 16
"""More than a prefill chunk has."""


class Table(StrEnum):
    """The tables of a sequence slot (kv_memory.py)."""

    ROWS = "rows"
    KEYS = "keys"
    C128 = "c128"
    ARENA = "arena"
    STAGING = "staging"


@dataclass(frozen=True)
class BlockLoad:
    """Arena record at `arena_offset` -> row, key and c128 blocks of the device; SKIP leaves one out."""

    arena_offset: int
    row_id: int = SKIP
    key_id: int = SKIP
    c128_id: int = SKIP


@dataclass(frozen=True)
class SetTable:
    """Write the beginning of a slot's row of a table: what attention sees from the next step on."""

    OP: ClassVar[str] = "set_table"
    table: Table
    slot: int
    values: tuple[int, ...]


@dataclass(frozen=True)
class EditTable:
    """Write single places of a slot's row of a table: a change costs what changed, not the whole row."""

    OP: ClassVar[str] = "edit_table"
    table: Table
    slot: int
    places: tuple[int, ...]
    values: tuple[int, ...]


@dataclass(frozen=True)
class ClearSlot:
    """Forget a sequence's tables and state."""

    OP: ClassVar[str] = "clear_slot"
    slot: int


@dataclass(frozen=True)
class Load:
    """Start copying records from the arena, beside the steps; `ConfirmLoads` asks whether it is done."""

    OP: ClassVar[str] = "load"
    loads: tuple[BlockLoad, ...]


@dataclass(frozen=True)
class Restore:
    """Put a resume record back into a slot; its parts lie at these offsets in the arena."""

    OP: ClassVar[str] = "restore"
    slot: int
    num_tokens: int
    arena_offsets: tuple[int, ...]


@dataclass(frozen=True)
class PrefillStep:
    """Process consecutive tokens of one sequence from `start` on, and say where the last ones looked.

    With `num_parts` only so many parts of it; a chunk under way is forgotten when another begins.
    """

    OP: ClassVar[str] = "prefill"
    slot: int
    start: int
    tokens: tuple[int, ...]
    evidence_tokens: int = 0
    num_parts: int = ALL_PARTS


@dataclass(frozen=True)
class PrefillMore:
    """Process so many parts more of the prefill chunk under way."""

    OP: ClassVar[str] = "prefill_more"
    num_parts: int


@dataclass(frozen=True)
class DecodeStep:
    """Process one token of each of several sequences."""

    OP: ClassVar[str] = "decode"
    slots: tuple[int, ...]
    positions: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class ConfirmLoads:
    """Tell each other which of the loads under way are done: the ranks' answers are joined after this."""

    OP: ClassVar[str] = "confirm_loads"


@dataclass(frozen=True)
class Stop:
    """The worker ends."""

    OP: ClassVar[str] = "stop"


Step = PrefillStep | PrefillMore | DecodeStep
Command = SetTable | EditTable | ClearSlot | Load | Restore | Step | ConfirmLoads | Stop
_BY_OP: dict[str, type[Command]] = {
    kind.OP: kind
    for kind in (
        SetTable,
        EditTable,
        ClearSlot,
        Load,
        Restore,
        PrefillStep,
        PrefillMore,
        DecodeStep,
        ConfirmLoads,
        Stop,
    )
}


def encode_batch(commands: Iterable[Command]) -> bytes:
    """One batch as msgpack."""
    body = {"v": VERSION, "commands": [_packed(command) for command in commands]}
    packed: bytes = msgpack.packb(body, use_bin_type=True)
    return packed


def decode_batch(data: bytes) -> list[Command]:
    """The batch again. Raises: IntegrityError for anything that `encode_batch` does not make."""
    try:
        body = msgpack.unpackb(data, raw=False, use_list=False)
        if body["v"] != VERSION:
            raise IntegrityError(f"commands v{body['v']}, this rank reads v{VERSION}")
        return [_unpacked(*packed) for packed in body["commands"]]
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise IntegrityError(f"not a batch of commands: {error!r}") from error


def _packed(command: Command) -> list[Any]:
    if isinstance(command, Load):
        loads = [(load.arena_offset, load.row_id, load.key_id, load.c128_id) for load in command.loads]
        return [command.OP, loads]
    return [command.OP, *(getattr(command, item.name) for item in fields(command))]


def _unpacked(op: str, *values: Any) -> Command:
    kind = _BY_OP[op]
    if kind is Load:
        return Load(tuple(BlockLoad(*load) for load in values[0]))
    if kind is SetTable or kind is EditTable:
        table, *rest = values
        return kind(Table(table), *rest)
    return kind(*values)
