"""Byte formats of KV rows and indexer keys, and the paged pools that hold them.

A block holds one *plane* per layer: all values of its entries, then all their scales.

    row, fp8 (V4-Flash: 448 nope, 64 rope)      offset in its span
        values  448 e4m3 nope dims                0
                 64 bf16 rope dims              448
        scales    7 UE8M0 (exponent + 127)        0     one per 64 nope dims, padded to 8 bytes
    key, fp8 (128 dims)
        values  128 e4m3                          0
        scales    1 fp32, a power of two          0
    key, mxfp4 (128 dims)
        values   64 bytes, two e2m1 each          0     low nibble = even dim
        scales    4 UE8M0                         0     one per 32 dims
    fp32 rows and keys: plain fp32 values, no scales.

Slot s of a layer: value at (s // entries) * block_bytes + layer_offset + (s % entries) * value_bytes,
scales after the plane's `entries` values. Sources: FlashMLA's fp8 sparse row; DeepSeek-V4's QAT
simulation, s = 2^ceil(log2(max(amax, 1e-4) / 448)).
"""

from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from forepage_kernels.checks import check_tensor
from forepage_kernels.errors import ShapeError
from forepage_kernels.mxfp4 import MX_GROUP, decode_mxfp4, encode_mxfp4

Format = Literal["fp8", "fp32"]
KeyFormat = Literal["fp8", "mxfp4", "fp32"]

ABSENT = -1
"""A slot, block id or offset that stands for nothing; every negative value means the same."""
SCALE_GROUP = 64
MIN_AMAX = 1e-4
LANE_BYTES = 8
"""Copies move 8-byte lanes: every span starts and ends on a multiple of it (not a single key's scales)."""
E4M3_TABLE = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)


@dataclass(frozen=True)
class RowLayout:
    """One layer's KV rows in a block. Raises: ShapeError for dims that break the 8-byte lanes."""

    entries: int
    nope_dims: int
    rope_dims: int
    format: Format

    def __post_init__(self) -> None:
        if self.entries < 1 or self.nope_dims < 1 or self.rope_dims < 0 or self.rope_dims % 2:
            raise ShapeError(f"row layout: impossible sizes {self}")
        if self.value_bytes % LANE_BYTES:
            raise ShapeError(f"row layout: {self.value_bytes} value bytes, not a multiple of {LANE_BYTES}")

    @property
    def head_dim(self) -> int:
        """Dims of a row: 512 for V4."""
        return self.nope_dims + self.rope_dims

    @property
    def dims(self) -> int:
        """Same as head_dim; the name rows and keys share."""
        return self.head_dim

    @property
    def scale_groups(self) -> int:
        """UE8M0 scales of a row: 7."""
        return 0 if self.format == "fp32" else -(-self.nope_dims // SCALE_GROUP)

    @property
    def value_bytes(self) -> int:
        """Bytes of a row's values: 576."""
        return 4 * self.head_dim if self.format == "fp32" else self.nope_dims + 2 * self.rope_dims

    @property
    def scale_bytes(self) -> int:
        """Bytes of a row's scales with padding: 8; none in fp32."""
        return -(-self.scale_groups // 8) * 8

    @property
    def plane_bytes(self) -> int:
        """Bytes a plane uses, before any padding its owner adds."""
        return self.entries * (self.value_bytes + self.scale_bytes)


@dataclass(frozen=True)
class KeyLayout:
    """One layer's indexer keys in a block. Raises: ShapeError unless quantised keys have 2^n dims."""

    entries: int
    dims: int
    format: KeyFormat

    def __post_init__(self) -> None:
        if self.entries < 1 or self.dims < 1 or self.value_bytes % LANE_BYTES:
            raise ShapeError(f"key layout: impossible sizes {self}")
        if self.rotated and self.dims & (self.dims - 1):
            raise ShapeError(
                f"key layout: {self.format} keys are Hadamard-rotated, {self.dims} dims is no power of two"
            )
        if self.format == "mxfp4" and self.dims % MX_GROUP:
            raise ShapeError(f"key layout: {self.dims} dims, not a multiple of {MX_GROUP}")

    @property
    def rotated(self) -> bool:
        """Whether keys are stored Hadamard-rotated: all quantised ones."""
        return self.format != "fp32"

    @property
    def value_bytes(self) -> int:
        """Bytes of a key's values: 128 in fp8, 64 in mxfp4."""
        if self.format == "mxfp4":
            return self.dims // 2
        return self.dims * (4 if self.format == "fp32" else 1)

    @property
    def scale_bytes(self) -> int:
        """Bytes of a key's scales: one fp32 in fp8, one UE8M0 per 32 dims in mxfp4, none in fp32."""
        if self.format == "mxfp4":
            return self.dims // MX_GROUP
        return 0 if self.format == "fp32" else 4

    @property
    def plane_bytes(self) -> int:
        """Bytes a plane uses: 8,448 in fp8, 4,352 in mxfp4."""
        return self.entries * (self.value_bytes + self.scale_bytes)


LayoutT = TypeVar("LayoutT", RowLayout, KeyLayout)


@dataclass(frozen=True)
class PlanePool(Generic[LayoutT]):
    """One layer's planes in a pool u8 [num_blocks, block_bytes]; `layer_offset` in bytes of a block."""

    bytes: Tensor
    layer_offset: int
    layout: LayoutT

    def __post_init__(self) -> None:
        check_tensor("pool", self.bytes, dtype=torch.uint8, shape=[None, None])
        if self.layer_offset < 0 or self.layer_offset + self.layout.plane_bytes > self.block_bytes:
            raise ShapeError(
                f"pool: a plane of {self.layout.plane_bytes} bytes at {self.layer_offset} "
                f"leaves its block of {self.block_bytes}"
            )
        if self.layer_offset % LANE_BYTES or self.block_bytes % LANE_BYTES:
            raise ShapeError(f"pool: layer_offset and block_bytes must be multiples of {LANE_BYTES}")

    @property
    def block_bytes(self) -> int:
        """Bytes from one block to the next."""
        return self.bytes.shape[1]

    @property
    def num_slots(self) -> int:
        """Slots of the whole pool: blocks x entries."""
        return self.bytes.shape[0] * self.layout.entries

    @property
    def values(self) -> Tensor:
        """Writable view u8 [num_blocks, entries, value_bytes]."""
        return self._span(self.layer_offset, self.layout.value_bytes)

    @property
    def scales(self) -> Tensor:
        """Writable view u8 [num_blocks, entries, scale_bytes]."""
        return self._span(
            self.layer_offset + self.layout.entries * self.layout.value_bytes, self.layout.scale_bytes
        )

    def _span(self, offset: int, width: int) -> Tensor:
        span = self.bytes[:, offset : offset + self.layout.entries * width]
        return span.view(self.bytes.shape[0], self.layout.entries, width)


class RowPool(PlanePool[RowLayout]):
    """Slots of KV rows: c4 rows, c128 rows, or window rings (block = sequence slot)."""


class KeyPool(PlanePool[KeyLayout]):
    """Slots of indexer keys; quantised keys are stored Hadamard-rotated."""


def hadamard(x: Tensor) -> Tensor:
    """Rotate the last dim, a power of two, by the orthonormal Sylvester-Hadamard matrix."""
    dims = x.shape[-1]
    if dims & (dims - 1) or dims == 0:
        raise ShapeError(f"hadamard: {dims} dims is no power of two")
    stride = 1
    while stride < dims:
        low, high = x.reshape(*x.shape[:-1], dims // (2 * stride), 2, stride).unbind(-2)
        x = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        stride *= 2
    return x * float(dims**-0.5)


def encode_rows(x: Tensor, layout: RowLayout) -> tuple[Tensor, Tensor]:
    """f32 [n, head_dim] -> values u8 [n, value_bytes], scales u8 [n, scale_bytes]; finite input only."""
    check_tensor("x", x, dtype=torch.float32, shape=[None, layout.head_dim])
    if layout.format == "fp32":
        return x.view(torch.uint8), x.new_empty(x.shape[0], 0, dtype=torch.uint8)
    groups = layout.scale_groups
    nope = F.pad(x[:, : layout.nope_dims], (0, groups * SCALE_GROUP - layout.nope_dims))
    values, exponents = _quantize(nope.view(-1, groups, SCALE_GROUP))  # [n, groups, 64], [n, groups]
    rope = x[:, layout.nope_dims :].to(torch.bfloat16).contiguous().view(torch.uint8)
    scales = F.pad(exponents.to(torch.uint8), (0, layout.scale_bytes - groups))
    return torch.cat((values.flatten(1)[:, : layout.nope_dims], rope), dim=1), scales


def decode_rows(values: Tensor, scales: Tensor, layout: RowLayout) -> Tensor:
    """values u8 [n, value_bytes], scales u8 [n, scale_bytes] -> f32 [n, head_dim]."""
    check_tensor("values", values, dtype=torch.uint8, shape=[None, layout.value_bytes])
    check_tensor("scales", scales, dtype=torch.uint8, shape=[values.shape[0], layout.scale_bytes])
    if layout.format == "fp32":
        return values.view(torch.float32)
    groups = layout.scale_groups
    nope = _e4m3(F.pad(values[:, : layout.nope_dims], (0, groups * SCALE_GROUP - layout.nope_dims)))
    scale = _scale(scales[:, :groups].to(torch.int32))  # [n, groups]
    nope = (nope.view(-1, groups, SCALE_GROUP) * scale.unsqueeze(2)).flatten(1)
    rope = values[:, layout.nope_dims :].view(torch.bfloat16).to(torch.float32)
    return torch.cat((nope[:, : layout.nope_dims], rope), dim=1)


def encode_keys(x: Tensor, layout: KeyLayout) -> tuple[Tensor, Tensor]:
    """f32 [n, dims] -> values u8 [n, value_bytes], scales u8 [n, scale_bytes]; does not rotate."""
    check_tensor("x", x, dtype=torch.float32, shape=[None, layout.dims])
    if layout.format == "fp32":
        return x.view(torch.uint8), x.new_empty(x.shape[0], 0, dtype=torch.uint8)
    if layout.format == "mxfp4":
        return encode_mxfp4(x)
    values, exponents = _quantize(x)
    return values, _scale(exponents).unsqueeze(1).view(torch.uint8)


def decode_keys(values: Tensor, scales: Tensor, layout: KeyLayout) -> Tensor:
    """values u8 [n, value_bytes], scales u8 [n, scale_bytes] -> f32 [n, dims], as stored (rotated)."""
    check_tensor("values", values, dtype=torch.uint8, shape=[None, layout.value_bytes])
    check_tensor("scales", scales, dtype=torch.uint8, shape=[values.shape[0], layout.scale_bytes])
    if layout.format == "fp32":
        return values.view(torch.float32)
    if layout.format == "mxfp4":
        return decode_mxfp4(values, scales)
    return _e4m3(values) * scales.view(torch.float32)


def load_rows(pool: RowPool | KeyPool, slots: Tensor) -> Tensor:
    """slots i64 [...] -> f32 [..., dims]; a negative slot gives zeros and reads nothing."""
    flat = slots.flatten()
    present = (flat >= 0).nonzero().squeeze(1)  # [present]
    block, entry = _place(pool, flat[present])
    values, scales = _lanes(pool.values)[block, entry], _lanes(pool.scales)[block, entry]
    rows = _decode(values.view(torch.uint8), scales.view(torch.uint8), pool)  # [present, dims]
    if present.shape[0] == flat.shape[0]:
        return rows.view(*slots.shape, pool.layout.dims)
    out = rows.new_zeros(flat.shape[0], pool.layout.dims)
    return out.index_copy_(0, present, rows).view(*slots.shape, pool.layout.dims)


def store_rows(pool: RowPool | KeyPool, slots: Tensor, x: Tensor) -> None:
    """Encode x f32 [n, dims] into slots i64 [n], in place; negative slots are skipped, others distinct."""
    present = slots >= 0
    block, entry = _place(pool, slots[present])
    values, scales = _encode(x[present], pool)
    pool.values[block, entry] = values
    pool.scales[block, entry] = scales


def _place(pool: RowPool | KeyPool, slots: Tensor) -> tuple[Tensor, Tensor]:
    entries = pool.layout.entries
    return torch.div(slots, entries, rounding_mode="floor"), slots % entries


def _encode(x: Tensor, pool: RowPool | KeyPool) -> tuple[Tensor, Tensor]:
    return encode_rows(x, pool.layout) if isinstance(pool, RowPool) else encode_keys(x, pool.layout)


def _decode(values: Tensor, scales: Tensor, pool: RowPool | KeyPool) -> Tensor:
    if isinstance(pool, RowPool):
        return decode_rows(values, scales, pool.layout)
    return decode_keys(values, scales, pool.layout)


def _lanes(span: Tensor) -> Tensor:
    """The same bytes in words as wide as the last dim allows: indexing copies word by word."""
    width = span.shape[-1]
    for size, word in ((8, torch.int64), (4, torch.int32), (2, torch.int16)):
        if width and width % size == 0:
            return span.view(word)
    return span


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x f32 [..., g] -> e4m3 bytes u8 [..., g], biased exponents i32 [...] of the power-of-two scales.

    amax <= 448 * 2^e exactly when amax / 2^8 <= 1.75 * 2^e, so the exponent is read off amax's bits:
    no logarithm that could round.
    """
    amax = x.abs().amax(dim=-1).clamp(min=MIN_AMAX)
    bits = amax.view(torch.int32)
    exponents = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(torch.int32)
    inverse = _scale(254 - exponents).unsqueeze(-1)
    return (x * inverse).to(torch.float8_e4m3fn).view(torch.uint8), exponents


def _e4m3(values: Tensor) -> Tensor:
    """e4m3 bytes u8 -> f32. On a CPU a table look-up is four times as fast as the cast."""
    if values.is_cuda:
        return values.view(torch.float8_e4m3fn).to(torch.float32)
    return E4M3_TABLE.index_select(0, values.flatten().to(torch.int32)).view(values.shape)


def _scale(exponents: Tensor) -> Tensor:
    """Biased exponents i32 -> f32 powers of two."""
    return (exponents << 23).view(torch.float32)
