"""The bytes of rows and keys: arenas, other workers and other programs read them, so they never change.

Three golden files hold hand-made entries, one line of hex each, as this file's own encoder writes them:
fractions and nearest codes, no code of ours. `LAYOUT_VERSION` in model/fingerprint.py must rise with any
change here, or workers would reuse blocks that they misread.
"""

import struct
from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from forepage.errors import ModelFormatError
from forepage.kv.geometry import KeyFormat, KvFormat, KvGeometry
from forepage.model.kv_pools import key_layout, row_layout
from forepage_kernels.layout import KeyLayout, RowLayout, decode_keys, decode_rows, encode_keys, encode_rows

GOLDEN = Path(__file__).parent / "kv_formats"
FLASH = {
    "num_hidden_layers": 43,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "index_head_dim": 128,
    "sliding_window": 128,
}
E4M3 = [
    Fraction(c & 7, 512) if c < 8 else Fraction(8 + (c & 7), 8) * Fraction(2) ** ((c >> 3) - 7)
    for c in range(127)
]
E2M1 = [Fraction(half, 2) for half in (0, 1, 2, 3, 4, 6, 8, 12)]
F32_1E_MINUS_4 = Fraction(struct.unpack("<f", struct.pack("<f", 1e-4))[0])
ENTRIES = ("zeros", "ramp", "powers", "ties", "edges")


def entry(name: str, dims: int) -> list[float]:
    """Hand-made values, exact in fp32."""
    if name == "zeros":  # of both signs: the smallest scale
        return [0.0, -0.0] * (dims // 2)
    if name == "ramp":  # every group has another scale
        return [(i % 17 - 8) * 2.0 ** (i // 32 - 5) * 1.125 for i in range(dims)]
    if name == "powers":  # down to subnormal codes and below them
        return [(-1.0) ** i * 2.0 ** -(i % 32) for i in range(dims)]
    if name == "ties":  # halfway between codes, under a scale of one (fp8, then fp4)
        steps = [448.0, 1.0625, 1.1875, -1.0625, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10]
        small = [6.0, 0.25, 0.75, -1.25, 1.75, -2.5, 3.5, 5.0]
        return [(steps if i // 32 % 2 == 0 else small)[i % 8] for i in range(dims)]
    # The last value under a scale, and the first past it.
    past = struct.unpack("<f", struct.pack("<I", struct.unpack("<I", struct.pack("<f", 448.0))[0] + 1))[0]
    return [
        (448.0, -6.0, past, 1e-5)[i // 32 % 4] if i % 32 == 3 else 0.0078125 * (i % 5) for i in range(dims)
    ]


def nearest(x: Fraction, values: list[Fraction]) -> int:
    """Index of the value nearest to |x| in ascending values; ties to the even index."""
    above = min(bisect_left(values, abs(x)), len(values) - 1)
    return min(max(above - 1, 0), above, key=lambda code: (abs(values[code] - abs(x)), code % 2))


def scale_exponent(values: list[float], largest: int, floor: Fraction) -> int:
    """Smallest e with max(amax, floor) <= largest * 2^e."""
    amax = max(max(abs(Fraction(value)) for value in values), floor)
    exponent = -140
    while amax > largest * Fraction(2) ** exponent:
        exponent += 1
    return exponent


def codes(values: list[float], exponent: int, table: list[Fraction], sign: int) -> list[int]:
    """Nearest codes under a scale, with the sign bit (of zeros too)."""
    return [
        nearest(Fraction(value) / Fraction(2) ** exponent, table)
        | (sign if struct.pack(">f", value)[0] & 0x80 else 0)
        for value in values
    ]


def bf16(value: float) -> bytes:
    """The upper half of an fp32, rounded to nearest even."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


def row_584(values: list[float]) -> bytes:
    """448 e4m3, 64 bf16, 7 UE8M0, one byte of padding."""
    nope, scales = bytearray(), bytearray()
    for group in range(0, 448, 64):
        part = values[group : group + 64]
        exponent = scale_exponent(part, 448, F32_1E_MINUS_4)
        nope += bytes(codes(part, exponent, E4M3, 0x80))
        scales.append(exponent + 127)
    return bytes(nope) + b"".join(bf16(value) for value in values[448:]) + bytes(scales) + b"\0"


def key_132(values: list[float]) -> bytes:
    """128 e4m3 and one fp32 scale."""
    exponent = scale_exponent(values, 448, F32_1E_MINUS_4)
    return bytes(codes(values, exponent, E4M3, 0x80)) + struct.pack("<f", 2.0**exponent)


def key_68(values: list[float]) -> bytes:
    """64 bytes of two e2m1, low nibble first, and 4 UE8M0."""
    nibbles: list[int] = []
    scales = bytearray()
    for group in range(0, 128, 32):
        part = values[group : group + 32]
        exponent = scale_exponent(part, 6, 6 * Fraction(2) ** -126)
        nibbles += codes(part, exponent, E2M1, 8)
        scales.append(exponent + 127)
    return bytes(low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2], strict=True)) + bytes(
        scales
    )


@dataclass(frozen=True)
class Format:
    """One entry format: its golden file, its independent encoder, and ours."""

    id: str
    dims: int
    num_bytes: int
    layout: RowLayout | KeyLayout

    def expected(self, values: list[float]) -> bytes:
        """As this file encodes it."""
        return {"row-584": row_584, "key-fp8-132": key_132, "key-mxfp4-68": key_68}[self.id](values)

    def golden(self) -> dict[str, bytes]:
        """The committed bytes by entry name."""
        lines = (GOLDEN / f"{self.id}.hex").read_text().splitlines()
        return {name: bytes.fromhex(text) for name, text in (line.split(": ") for line in lines)}

    def encode(self, x: Tensor) -> Tensor:
        """x f32 [n, dims] -> u8 [n, num_bytes], values then scales."""
        encoded = (
            encode_rows(x, self.layout) if isinstance(self.layout, RowLayout) else encode_keys(x, self.layout)
        )
        return torch.cat(encoded, dim=1)

    def decode(self, stored: Tensor) -> Tensor:
        """u8 [n, num_bytes] -> f32 [n, dims]."""
        values, scales = (
            part.contiguous() for part in stored.split([self.layout.value_bytes, self.layout.scale_bytes], 1)
        )
        if isinstance(self.layout, RowLayout):
            return decode_rows(values, scales, self.layout)
        return decode_keys(values, scales, self.layout)


FORMATS = [
    Format("row-584", 512, 584, RowLayout(64, 448, 64, "fp8")),
    Format("key-fp8-132", 128, 132, KeyLayout(64, 128, "fp8")),
    Format("key-mxfp4-68", 128, 68, KeyLayout(64, 128, "mxfp4")),
]
each_format = pytest.mark.parametrize("kv_format", FORMATS, ids=lambda kv_format: kv_format.id)
each_entry = pytest.mark.parametrize("name", ENTRIES)


@each_format
@each_entry
def test_golden_bytes_are_what_the_format_says(kv_format: Format, name: str) -> None:
    golden = kv_format.golden()
    assert tuple(golden) == ENTRIES
    assert len(golden[name]) == kv_format.num_bytes
    assert golden[name].hex() == kv_format.expected(entry(name, kv_format.dims)).hex()


@each_format
@each_entry
def test_encoded_entries_are_the_golden_bytes(kv_format: Format, name: str) -> None:
    x = torch.tensor([entry(name, kv_format.dims)])
    assert bytes(kv_format.encode(x)[0].tolist()).hex() == kv_format.golden()[name].hex()


@each_format
def test_values_and_then_bytes_survive_round_trips(kv_format: Format) -> None:
    """Values at once; bytes from the second encoding on.

    A group whose largest value was rounded down to half its scale's range comes back under the next
    smaller scale: the same values in other codes, and those stay.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, kv_format.dims, generator=generator)
    x *= 10.0 ** torch.randint(-3, 3, (500, 1), generator=generator)
    golden = torch.tensor([list(data) for data in kv_format.golden().values()], dtype=torch.uint8)
    decoded = kv_format.decode(torch.cat((golden, kv_format.encode(x))))
    stored = kv_format.encode(decoded)
    assert torch.equal(kv_format.decode(stored), decoded)
    assert torch.equal(kv_format.encode(kv_format.decode(stored)), stored)


def test_geometry_has_the_published_sizes() -> None:
    fp8 = KvGeometry.from_config(FLASH, KvFormat.FP8)
    mxfp4 = KvGeometry.from_config(FLASH, KvFormat.FP8, KeyFormat.MXFP4)
    assert (fp8.row_bytes, fp8.key_bytes, mxfp4.key_bytes) == (584, 132, 68)
    assert (fp8.keys_plane_bytes, mxfp4.keys_plane_bytes) == (8448, 4352)
    assert fp8.record_bytes - mxfp4.record_bytes == 21 * 64 * 64
    assert mxfp4.rows_bytes == fp8.rows_bytes


@pytest.mark.parametrize(
    ("tokens", "published"),
    [(65_536, 233_524_224), (262_144, 924_453_888), (524_288, 1_845_693_440), (1_048_576, 3_688_172_544)],
)
def test_geometry_with_mxfp4_keys_costs_what_is_published(tokens: int, published: int) -> None:
    """Within the rows' page padding (64 B a layer and block), without the compressor state."""
    mxfp4 = KvGeometry.from_config(FLASH, KvFormat.FP8, KeyFormat.MXFP4)
    blocks = mxfp4.num_blocks(tokens)
    held = mxfp4.kv_bytes(num_tokens=tokens, row_blocks=blocks, key_blocks=blocks) - mxfp4.state_bytes
    assert held - published == blocks * 21 * 64


def test_mxfp4_keys_without_whole_groups_are_refused() -> None:
    with pytest.raises(ModelFormatError, match="index_head_dim"):
        KvGeometry.from_config({**FLASH, "index_head_dim": 16}, KvFormat.FP8, KeyFormat.MXFP4)


@pytest.mark.parametrize("row_format", list(KvFormat))
@pytest.mark.parametrize("key_format", [KeyFormat.FP8, KeyFormat.MXFP4])
def test_layouts_have_the_geometrys_sizes(row_format: KvFormat, key_format: KeyFormat) -> None:
    geometry = KvGeometry.from_config(FLASH, row_format, key_format)
    keys, rows = key_layout(geometry), row_layout(geometry, geometry.block_entries)
    assert (keys.value_bytes, keys.scale_bytes) == (geometry.key_value_bytes, geometry.key_scale_bytes)
    assert (rows.value_bytes, rows.scale_bytes) == (geometry.row_value_bytes, geometry.row_scale_bytes)
    assert keys.plane_bytes == geometry.keys_plane_bytes
    assert rows.plane_bytes <= geometry.rows_plane_bytes
    assert keys.format == ("fp32" if row_format is KvFormat.FP32 else key_format)
