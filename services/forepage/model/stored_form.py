"""How a checkpoint stores a tensor: safetensors dtype and shape, with or without block scales; no torch.

    form    values                       scales                              value of w[r, c]
    plain   BF16, F16, F32 or I64        none                                as stored
    FP8     F8_E4M3 [O, I]               F8_E8M0 [ceil(O/128), ceil(I/128)]  e4m3 * 2^(scale - 127)
    MXFP4   I8 [O, I/2], low nibble      F8_E8M0 [O, ceil(I/32)]             e2m1 * 2^(scale - 127)
            is the even column
Values of `X` are in `X.weight`, scales in `X.scale`. Source: DeepSeek-V4-Flash release.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from forepage.model.spec import ModelSpec
from forepage.model.weight_table import Role, WeightEntry, mtp_table, weight_table

WEIGHT_SUFFIX = ".weight"
SCALE_SUFFIX = ".scale"
SCALE_DTYPE = "F8_E8M0"
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    SCALE_DTYPE: 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
"""Every whole-byte dtype of safetensors; most of them no checkpoint of ours may use."""
_FLOATS = ("BF16", "F16", "F32")
_STORED_BF16 = {Role.MATRIX, Role.FP32_MATRIX, Role.LINEAR, Role.EXPERT, Role.EMBEDDING, Role.NORM}
"""Of the release's tensors, those that are not quantised."""


@dataclass(frozen=True)
class Unit:
    """Rows and columns of the matrix that one stored element stands for."""

    rows: int
    columns: int

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Stored shape of a tensor of this (unquantised) shape."""
        if len(shape) != 2:
            return shape
        return (-(-shape[0] // self.rows), -(-shape[1] // self.columns))


class Form(Enum):
    """The three forms: unit of the values, unit of the scales (none: no scales)."""

    PLAIN = (Unit(1, 1), None)
    FP8 = (Unit(1, 1), Unit(128, 128))
    FP4 = (Unit(1, 2), Unit(1, 32))

    def __init__(self, values: Unit, scales: Unit | None) -> None:
        self.values = values
        self.scales = scales


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, as its header says."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class Span:
    """Part of a tensor: rows (dim 0) and, of a matrix, columns start..stop-1."""

    rows: slice
    columns: slice

    @classmethod
    def of(cls, shape: tuple[int, ...], rows: slice | None = None, columns: slice | None = None) -> "Span":
        """The part, or all where none is named. Raises: ValueError for a part the tensor lacks."""
        width = shape[1] if len(shape) == 2 else 1
        return cls(_bounds(rows, shape[0], "rows"), _bounds(columns, width, "columns"))

    def stored(self, unit: Unit) -> "Span":
        """Stored elements that hold this part."""
        return Span(_in_units(self.rows, unit.rows), _in_units(self.columns, unit.columns))

    def shape(self, num_dims: int) -> tuple[int, ...]:
        """Shape of the part of a tensor of so many dims (1 or 2)."""
        sizes = (self.rows.stop - self.rows.start, self.columns.stop - self.columns.start)
        return sizes[:num_dims]


def allowed_forms(role: Role) -> Mapping[str, Form]:
    """Value dtype -> form, for tensors of this role."""
    if role is Role.EXPERT_IDS:
        return {"I64": Form.PLAIN}
    forms = dict.fromkeys(_FLOATS, Form.PLAIN)
    if role in (Role.LINEAR, Role.EXPERT):
        forms["F8_E4M3"] = Form.FP8
    if role is Role.EXPERT:
        forms["I8"] = Form.FP4
    return forms


def scale_name(weight: str) -> str:
    """`X.weight` -> `X.scale`."""
    return weight.removesuffix(WEIGHT_SUFFIX) + SCALE_SUFFIX


def stored_parts(
    name: str, entry: WeightEntry, dtype: str, span: Span | None = None
) -> Iterator[tuple[str, StoredTensor]]:
    """The values, and the scales if the dtype calls for them, of a tensor or of a part of it."""
    form = allowed_forms(entry.role)[dtype]
    span = span or Span.of(entry.shape)
    num_dims = len(entry.shape)
    yield name, StoredTensor(dtype, span.stored(form.values).shape(num_dims))
    if form.scales is not None:
        yield scale_name(name), StoredTensor(SCALE_DTYPE, span.stored(form.scales).shape(num_dims))


def announced_tensors(spec: ModelSpec, config: Mapping[str, object]) -> dict[str, StoredTensor]:
    """What a release with this config holds, the draft blocks included: its tensors by official name."""
    return {
        part: stored
        for name, entry in (weight_table(spec) | mtp_table(spec)).items()
        for part, stored in stored_parts(name, entry, announced_dtype(entry.role, config))
    }


def is_quantised(config: Mapping[str, object]) -> bool:
    """Whether the config says that matrices are stored in FP8 or MXFP4."""
    return bool(config.get("quantization_config"))


def announced_dtype(role: Role, config: Mapping[str, object]) -> str:
    """Dtype of a tensor's values by what the config says of quantisation.

    The first Flash release names no `expert_dtype`; its experts are MXFP4 like the later ones'.
    """
    if role is Role.EXPERT_IDS:
        return "I64"
    if role in (Role.LINEAR, Role.EXPERT) and is_quantised(config):
        is_fp4 = role is Role.EXPERT and config.get("expert_dtype", "fp4") == "fp4"
        return "I8" if is_fp4 else "F8_E4M3"
    return "BF16" if role in _STORED_BF16 else "F32"


def _bounds(part: slice | None, size: int, what: str) -> slice:
    if part is None:
        return slice(0, size)
    start, stop, step = part.indices(size)
    if step != 1 or not start < stop or part.stop not in (None, stop):
        raise ValueError(f"{what} {part} of {size}")
    return slice(start, stop)


def _in_units(part: slice, unit: int) -> slice:
    return slice(part.start // unit, -(-part.stop // unit))
