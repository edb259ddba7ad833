"""Reads a checkpoint's tensors, or parts of them, from its files straight into their place.

Plain file reads and no mapping: a mapped shard would count as this process's memory until it is closed.
Beside the tensor itself only a tile of it is held (TILE_BYTES as stored, twenty times that while it is
dequantised), so a load needs little more than what stays.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from forepage.errors import ModelFormatError
from forepage.model.checkpoint import Checkpoint
from forepage.model.quantised import QuantisedFp4, QuantisedFp8, Stored
from forepage.model.safetensors_header import FileTensor
from forepage.model.spec import ModelSpec
from forepage.model.stored_form import DTYPE_BYTES, Form, Span, allowed_forms, scale_name
from forepage.model.weight_table import weight_table

TILE_BYTES = 1 << 20
TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I64": torch.int64,
    "I8": torch.uint8,  # two nibbles: such a byte has no sign
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}


class CheckpointReader:
    """Reads by official name; parts are given in rows and columns of the unquantised tensor."""

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec) -> None:
        self._tensors = checkpoint.tensors
        self._table = weight_table(spec)

    def read(self, name: str, *, rows: slice | None = None, columns: slice | None = None) -> Stored:
        """The tensor, or a part of it, as stored, on the CPU; nothing more than that is kept.

        Raises: ModelFormatError naming tensor and file when its data can't be read; KeyError for a name
        the model lacks; ValueError for a part the tensor lacks, or in MXFP4 one that cuts through the
        32 columns of a scale.
        """
        return self._read(name, Span.of(self._table[name].shape, rows, columns))

    def read_into(
        self, out: Tensor, name: str, *, rows: slice | None = None, columns: slice | None = None
    ) -> None:
        """Dequantise the tensor, or a part of it, into `out`: any dtype and device, the part's shape.

        Raises: as `read`; ValueError when `out` has another shape.
        """
        shape = self._table[name].shape
        span = Span.of(shape, rows, columns)
        if tuple(out.shape) != span.shape(len(shape)):
            raise ValueError(f"{name}: out is {list(out.shape)}, the part {list(span.shape(len(shape)))}")
        for tile in _tiles(self._tensors[name], span.rows):
            part = self._read(name, Span(tile, span.columns))
            plain = part if isinstance(part, Tensor) else part.dequantise(out.dtype)
            out[tile.start - span.rows.start : tile.stop - span.rows.start].copy_(plain)

    def read_stored_into(self, values: Tensor, scales: Tensor, name: str, span: Span) -> None:
        """Copy a quantised tensor's part, which starts with a scale, into tensors of its stored dtypes.

        Raises: as `read`; ModelFormatError for what kernels don't decode: values that are no numbers, and
        scales far beyond any trained weight's.
        """
        for tile in _tiles(self._tensors[name], span.rows):
            # Scales are read with each tile again: a tile may be part of a square.
            part = self._read(name, Span(tile, span.columns))
            assert not isinstance(part, Tensor)
            self._check_decodable(name, part)
            first_row = tile.start - span.rows.start
            values[first_row : first_row + part.values.shape[0]].copy_(part.values)
            first_scale = first_row // part.unit.rows
            scales[first_scale : first_scale + part.scales.shape[0]].copy_(part.scales)

    def _check_decodable(self, name: str, part: QuantisedFp8 | QuantisedFp4) -> None:
        problem = part.undecodable()
        if problem is not None:
            raise ModelFormatError(
                f"{self._tensors[name].path}: {name} {problem}: "
                "it can't be held as stored, set FOREPAGE_MODEL__WEIGHT_DTYPE to bf16 or fp32"
            )

    def _read(self, name: str, span: Span) -> Stored:
        tensor = self._tensors[name]
        form = allowed_forms(self._table[name].role)[tensor.stored.dtype]
        if form.scales is None:
            return _read_part(tensor, span)
        if form is Form.FP4 and (span.columns.start % form.scales.columns):
            raise ValueError(f"{name}: columns {span.columns} cut through a scale")
        values = _read_part(tensor, span.stored(form.values))
        scales = _read_part(self._tensors[scale_name(name)], span.stored(form.scales))
        if form is Form.FP4:
            return QuantisedFp4(values, scales)
        return QuantisedFp8(
            values,
            scales,
            row_offset=span.rows.start % form.scales.rows,
            column_offset=span.columns.start % form.scales.columns,
        )


def _read_part(tensor: FileTensor, span: Span) -> Tensor:
    """Stored elements of a part: whole rows in one read, else row tiles of which the columns are kept."""
    shape = tensor.stored.shape
    part = torch.empty(span.shape(len(shape)), dtype=TORCH_DTYPES[tensor.stored.dtype])
    whole = Span.of(shape)
    if span.columns == whole.columns:
        _fill(tensor, part, first_row=span.rows.start)
        return part
    for tile in _tiles(tensor, span.rows):
        rows = torch.empty((tile.stop - tile.start, *shape[1:]), dtype=part.dtype)
        _fill(tensor, rows, first_row=tile.start)
        part[tile.start - span.rows.start : tile.stop - span.rows.start] = rows[:, span.columns]
    return part


def _fill(tensor: FileTensor, out: Tensor, *, first_row: int) -> None:
    """Read the rows from `first_row` on into `out`, contiguous, of the file's dtype."""
    left = memoryview(out.view(torch.uint8).numpy().data).cast("B")
    try:
        with tensor.path.open("rb", buffering=0) as file:
            file.seek(tensor.offset + first_row * _row_bytes(tensor))
            while left:
                count = file.readinto(left)
                if not count:
                    raise ModelFormatError(
                        f"{tensor.path}: truncated in {tensor.name}: {len(left)} bytes are missing"
                    )
                left = left[count:]
    except OSError as error:
        raise ModelFormatError(f"{tensor.path}: can't read {tensor.name}: {error}") from error


def _tiles(tensor: FileTensor, rows: slice) -> Iterator[slice]:
    """Row ranges of about TILE_BYTES as stored."""
    step = max(1, TILE_BYTES // _row_bytes(tensor))
    for first in range(rows.start, rows.stop, step):
        yield slice(first, min(first + step, rows.stop))


def _row_bytes(tensor: FileTensor) -> int:
    return DTYPE_BYTES[tensor.stored.dtype] * math.prod(tensor.stored.shape[1:])
