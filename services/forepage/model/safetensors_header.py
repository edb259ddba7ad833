"""The header of a safetensors file, read by ourselves: no torch, no data touched, every fault by its name.

Layout of the file: u64 little-endian header length n, n bytes of JSON (name -> dtype, shape, data_offsets
[begin, end) into what follows; `__metadata__` is free text), then the data, in which the tensors lie
without gap or overlap. Source: safetensors format description.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeGuard

from forepage.errors import ModelFormatError
from forepage.model.stored_form import DTYPE_BYTES, StoredTensor

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The format's own bound."""
METADATA = "__metadata__"


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a file: what the header calls it and where its data begins in the file."""

    name: str
    stored: StoredTensor
    path: Path
    offset: int


def read_header(path: Path) -> list[FileTensor]:
    """The file's tensors in the order of their data.

    Raises: ModelFormatError naming the file, and the tensor, that is unreadable, truncated or inconsistent.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            text = _header_text(path, file, size)
    except OSError as error:
        raise ModelFormatError(f"{path}: can't read: {error}") from error
    try:
        # Of two equal keys json keeps the last: a tensor would vanish in silence.
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path}: the header is not safetensors': {error}") from error
    if not isinstance(header, dict):
        raise ModelFormatError(f"{path}: the header is not a JSON object")
    header.pop(METADATA, None)
    data = LENGTH_BYTES + len(text)
    tensors = [_tensor(path, data, name, fields) for name, fields in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.stored.num_bytes))
    _check_tiling(path, tensors, data, size)
    return tensors


def _header_text(path: Path, file: BinaryIO, size: int) -> bytes:
    file.seek(0)
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if size < LENGTH_BYTES or length > size - LENGTH_BYTES:
        raise ModelFormatError(f"{path}: truncated: {size} bytes do not hold the header")
    if length > MAX_HEADER_BYTES:
        raise ModelFormatError(f"{path}: a header of {length} bytes is not safetensors'")
    return file.read(length)


def _tensor(path: Path, data: int, name: str, fields: object) -> FileTensor:
    """One entry of the header, checked by itself."""
    if not isinstance(fields, dict):
        raise ModelFormatError(f"{path}: {name}: the header's entry is not an object")
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ModelFormatError(f"{path}: {name} has unknown dtype {dtype!r}")
    if not _are_counts(shape):
        raise ModelFormatError(f"{path}: {name} has shape {shape!r}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ModelFormatError(f"{path}: {name} has data_offsets {offsets!r}")
    stored = StoredTensor(dtype, tuple(shape))
    begin, end = offsets
    if end - begin != stored.num_bytes:
        raise ModelFormatError(
            f"{path}: {name}: {dtype} {shape} takes {stored.num_bytes} bytes, "
            f"the header gives it {end - begin}"
        )
    return FileTensor(name, stored, path, data + begin)


def _check_tiling(path: Path, tensors: list[FileTensor], data: int, size: int) -> None:
    """The tensors follow each other from the header's end to the file's."""
    at = data
    for tensor in tensors:
        if tensor.offset != at:
            raise ModelFormatError(f"{path}: {tensor.name}: its data doesn't follow the tensor before it")
        at += tensor.stored.num_bytes
        if at > size:
            raise ModelFormatError(f"{path}: truncated in {tensor.name}: {at - size} bytes of it are missing")
    if at != size:
        raise ModelFormatError(f"{path}: {size - at} bytes follow the last tensor")


def _are_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields: dict[str, object] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"{name} is named twice")
        fields[name] = value
    return fields
